"""``graphopt::gather_codes``: the chosen neurons' weights, in int8, into a buffer.

weight, indices, dim and fused as for ``graphopt::gather_neurons``; where ``transposed``
the weight lies as [inputs, outputs]. What is gathered is [N, K], outputs by inputs, and
is turned into codes int8 [N, K] with a scale each output, float32 [N] (for each R of
``indices`` [R, C], where that is more than 1): a row of codes lies in one piece, and
its scale is of the chosen weights alone. Both buffers stay where they are.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.ops.int8.weights import quantize_weight
from graphopt.ops.neurons.gather import places_of

_library = torch.library.Library("graphopt", "FRAGMENT")
_library.define(
    "gather_codes(Tensor weight, Tensor indices, Tensor(a!) codes, Tensor(b!) scales, "
    "int dim=0, int fused=1, bool transposed=False) -> ()"
)


def gather_codes(
    weight: Tensor,
    indices: Tensor,
    codes: Tensor,
    scales: Tensor,
    dim: int = 0,
    fused: int = 1,
    transposed: bool = False,
) -> None:
    """Gather, and turn into codes as `graphopt.ops.int8.weights.quantize_weight`.

    Raises ValueError where the buffers do not fit.
    """
    plain, dim = (weight.t(), 1 - dim) if transposed else (weight, dim)
    _check(plain, indices, codes, scales, dim, fused)
    places = places_of(plain, indices, dim, fused)
    found = plain.index_select(dim, places.flatten())
    rows = found.unflatten(dim, places.shape).movedim(dim, 0) if dim else found
    made, steps = quantize_weight(rows.reshape(-1, codes.shape[-1]))
    codes.copy_(made.view(codes.shape))
    scales.copy_(steps.view(scales.shape))


# Decomposed wherever it is traced: Inductor makes one loop over each row of it.
torch.library.impl(_library, "gather_codes", "CompositeImplicitAutograd")(gather_codes)


def _check(
    plain: Tensor,
    indices: Tensor,
    codes: Tensor,
    scales: Tensor,
    dim: int,
    fused: int,
) -> None:
    rows, wanted = indices.shape[0], list(plain.shape)
    wanted[dim] = fused * indices.shape[1]
    wanted = wanted if rows == 1 else [rows, *wanted]
    if list(codes.shape) != wanted or list(scales.shape) != wanted[:-1]:
        raise ValueError(
            f"graphopt.gather_codes: codes {tuple(codes.shape)} with scales "
            f"{tuple(scales.shape)} do not fit {rows} choices of {indices.shape[1]} of "
            f"{tuple(plain.shape)}"
        )
