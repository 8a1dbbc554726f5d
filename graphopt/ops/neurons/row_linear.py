"""``graphopt::row_linear``: a linear whose weight each batch row has for itself.

input [B, S, K] or [B * S, K], weight [B, N, K] ([B, K, N] where ``transposed``), bias
[B, N], [N] or None; result [B, S, N] or [B * S, N]. With ``scales`` float32 [B, N] the
weight is int8 codes, each worth its output's scale. Sums of one token a row are made in
float32 at least.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.fx.experimental.symbolic_shapes import statically_known_true

_library = torch.library.Library("graphopt", "FRAGMENT")
_library.define(
    "row_linear(Tensor input, Tensor weight, Tensor? bias=None, "
    "bool transposed=False, Tensor? scales=None) -> Tensor"
)


def row_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    transposed: bool = False,
    scales: Tensor | None = None,
) -> Tensor:
    """Return input @ weight^T + bias, row by row, in the dtype of ``input``.

    One token a row, on a CPU or by codes: built of sums that Inductor makes one loop
    of, which reads every weight once, as `graphopt.ops.skinny_linear`.
    """
    rows = input.reshape(weight.shape[0], -1, input.shape[-1])
    bias = bias[:, None] if bias is not None and bias.ndim == 2 else bias
    wide, loops = input.dtype, input.device.type == "cpu" or scales is not None
    if loops and _is_single(input, weight):
        wide = torch.promote_types(wide, torch.float32)
        found = _sums(rows.to(wide), weight.to(wide), transposed)
    else:
        across = weight if transposed else weight.transpose(1, 2)
        found = torch.bmm(rows, across.to(wide))
    found = found if scales is None else found * scales[:, None]
    found = found if bias is None else found + bias.to(wide)
    return found.to(input.dtype).view(*input.shape[:-1], found.shape[-1])


def _sums(rows: Tensor, weight: Tensor, transposed: bool) -> Tensor:
    """Return [B, 1, N] of rows [B, 1, K]."""
    if transposed:
        return (weight * rows.transpose(1, 2)).sum(1, keepdim=True)
    return (weight * rows).sum(2)[:, None]


def _is_single(input: Tensor, weight: Tensor) -> bool:
    """Tell whether a row has one token; a number that depends on data is more."""
    if input.ndim == 2:
        return bool(statically_known_true(input.shape[0] == weight.shape[0]))
    return bool(statically_known_true(input.shape[1] == 1))


# Decomposed wherever it is traced, so that it fuses.
torch.library.impl(_library, "row_linear", "CompositeImplicitAutograd")(row_linear)
