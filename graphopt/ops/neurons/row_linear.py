"""``graphopt::row_linear``: a linear whose weight each batch row has for itself.

input [B, 1, K] or [B, K], weight [B, N, K] ([B, K, N] where ``transposed``), bias
[B, N] or None; result [B, 1, N] or [B, N]. Sums are made in float32 at least.
"""

from __future__ import annotations

import torch
from torch import Tensor

_library = torch.library.Library("graphopt", "FRAGMENT")
_library.define(
    "row_linear(Tensor input, Tensor weight, Tensor? bias=None, "
    "bool transposed=False) -> Tensor"
)


def row_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    transposed: bool = False,
) -> Tensor:
    """Return input @ weight^T + bias, row by row, in the dtype of ``input``.

    On a CPU it is built of sums that Inductor makes one loop of, which reads every
    weight once, as `graphopt.ops.skinny_linear`.
    """
    rows = input.reshape(weight.shape[0], 1, input.shape[-1])
    across = weight if transposed else weight.transpose(1, 2)
    if input.device.type == "cpu":
        wide = torch.promote_types(input.dtype, torch.float32)
        found = (across.to(wide) * rows.transpose(1, 2).to(wide)).sum(1)
        found = found if bias is None else found + bias.to(wide)
    else:
        found = torch.bmm(rows, across).squeeze(1)
        found = found if bias is None else found + bias
    return found.to(input.dtype).view(*input.shape[:-1], found.shape[-1])


# Decomposed wherever it is traced, so that it fuses.
torch.library.impl(_library, "row_linear", "CompositeImplicitAutograd")(row_linear)
