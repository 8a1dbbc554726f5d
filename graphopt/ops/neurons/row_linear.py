"""``graphopt::row_linear``: a linear whose weight each batch row has for itself.

input [B, S, K] or [B * S, K], weight [B, N, K] ([B, K, N] where ``transposed``), bias
[B, N], [N] or None; result [B, S, N] or [B * S, N]. Sums of one token a row are made in
float32 at least.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

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

    One token a row on a CPU: built of sums that Inductor makes one loop of, which reads
    every weight once, as `graphopt.ops.skinny_linear`.
    """
    rows = input.reshape(weight.shape[0], -1, input.shape[-1])
    across = weight if transposed else weight.transpose(1, 2)
    bias = bias[:, None] if bias is not None and bias.ndim == 2 else bias
    wide = input.dtype
    if input.device.type == "cpu" and _is_single(input, weight):
        wide = torch.promote_types(wide, torch.float32)
        found = (across.to(wide) * rows.transpose(1, 2).to(wide)).sum(1, keepdim=True)
    else:
        found = torch.bmm(rows, across)
    found = found if bias is None else found + bias.to(wide)
    return found.to(input.dtype).view(*input.shape[:-1], found.shape[-1])


def _is_single(input: Tensor, weight: Tensor) -> bool:
    """Tell whether a row has one token; a number that depends on data is more."""
    if input.ndim == 2:
        return bool(statically_known_true(input.shape[0] == weight.shape[0]))
    return bool(statically_known_true(input.shape[1] == 1))


# Decomposed wherever it is traced, so that it fuses.
torch.library.impl(_library, "row_linear", "CompositeImplicitAutograd")(row_linear)
