"""``graphopt::gather_codes``: the chosen neurons' weights, in int8, into a buffer.

weight, indices, dim and fused as for ``graphopt::gather_neurons``; where ``transposed``
the weight lies as [inputs, outputs]. What is gathered is [N, K], outputs by inputs, and
is turned into codes int8 [N, K] with a scale each output, float32 [N] (for each R of
``indices`` [R, C], where that is more than 1): a row of codes lies in one piece, and
its scale is of the chosen weights alone; of the range ``most``, float32 [R, N], where
other ranks have some of them. Both buffers stay where they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.ops.int8.weights import row_codes, row_scales, scales_of

_library = torch.library.Library("graphopt", "FRAGMENT")
_library.define(
    "gather_codes(Tensor weight, Tensor indices, Tensor(a!) codes, Tensor(b!) scales, "
    "int dim=0, int fused=1, bool transposed=False, Tensor? most=None) -> ()"
)


def gather_codes(
    weight: Tensor,
    indices: Tensor,
    codes: Tensor,
    scales: Tensor,
    dim: int = 0,
    fused: int = 1,
    transposed: bool = False,
    most: Tensor | None = None,
) -> None:
    """Gather, and turn into codes as `graphopt.ops.int8.weights.quantize_weight`.

    Raises ValueError where the buffers do not fit.
    """
    sizes, rows = list(weight.shape), indices.shape[0]
    sizes[dim] = fused * indices.shape[1]
    _check(sizes[::-1] if transposed else sizes, rows, codes, scales)
    found = weight.new_empty([rows, *sizes])
    torch.ops.graphopt.gather_neurons(weight, indices, found, dim, fused)
    found = found.transpose(1, 2) if transposed else found
    flat = found.reshape(-1, codes.shape[-1])
    steps = row_scales(flat) if most is None else scales_of(most.flatten())
    made = row_codes(flat, steps)
    codes.copy_(made.view(codes.shape))
    scales.copy_(steps.view(scales.shape))


# Decomposed wherever it is traced, so that Inductor makes loops of what is no gather.
torch.library.impl(_library, "gather_codes", "CompositeImplicitAutograd")(gather_codes)


def _check(sizes: list[int], rows: int, codes: Tensor, scales: Tensor) -> None:
    """``sizes``: of what is gathered for each of ``rows``, outputs by inputs."""
    wanted = sizes if rows == 1 else [rows, *sizes]
    if list(codes.shape) != wanted or list(scales.shape) != wanted[:-1]:
        raise ValueError(
            f"graphopt.gather_codes: codes {tuple(codes.shape)} with scales "
            f"{tuple(scales.shape)} do not fit {rows} choices of {sizes}"
        )
