"""``graphopt::gather_neurons``: copy the chosen neurons' weights into a buffer.

weight has the neurons along ``dim``: rows [F, D] of a gate or up projection (0),
columns [D, F] of a down projection (1), a bias [F]; a fused projection has ``fused`` of
them one behind the other, [fused * F, D]. The buffer has C = ``indices.shape[1]`` in
the place of F, for each R of ``indices`` [R, C]: [R, fused * C, D] or [R, D, C], or
without R where that is 1. It stays where it is.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("graphopt", "FRAGMENT")
_library.define(
    "gather_neurons(Tensor weight, Tensor indices, Tensor(a!) buffer, int dim=0, "
    "int fused=1) -> ()"
)


def gather_neurons(
    weight: Tensor, indices: Tensor, buffer: Tensor, dim: int = 0, fused: int = 1
) -> None:
    """Call ``graphopt::gather_neurons``; see the module."""
    torch.ops.graphopt.gather_neurons(weight, indices, buffer, dim, fused)


@torch.library.register_fake("graphopt::gather_neurons", lib=_library)
def _fake(
    weight: Tensor, indices: Tensor, buffer: Tensor, dim: int = 0, fused: int = 1
) -> None:
    wanted = list(weight.shape)
    wanted[dim] = fused * indices.shape[1]
    rows = indices.shape[0]
    if list(buffer.shape) not in ([rows, *wanted], wanted if rows == 1 else None):
        raise ValueError(
            f"graphopt.gather_neurons: a buffer {tuple(buffer.shape)} does not fit "
            f"{rows} choices of {indices.shape[1]} of {tuple(weight.shape)}"
        )


def places_of(weight: Tensor, indices: Tensor, dim: int = 0, fused: int = 1) -> Tensor:
    """Return the places of the chosen neurons along ``dim``, [R, fused * C]."""
    step = weight.shape[dim] // fused
    start = torch.arange(fused, device=indices.device) * step
    return (indices[:, None] + start[:, None]).flatten(1)


def gather_reference(
    weight: Tensor, indices: Tensor, buffer: Tensor, dim: int = 0, fused: int = 1
) -> None:
    """Gather in plain ATen, on any device; arguments as in the module."""
    places = places_of(weight, indices, dim, fused)
    found = weight.index_select(dim, places.flatten())
    rows = found.unflatten(dim, places.shape).movedim(dim, 0)
    buffer.copy_(rows.reshape(buffer.shape))


@torch.library.impl(_library, "gather_neurons", "CUDA")
def _cuda(weight: Tensor, indices: Tensor, buffer: Tensor, *rest: Any) -> None:
    from graphopt.codegen.triton import neurons as kernel

    _run(kernel, weight, indices, buffer, *rest)


@torch.library.impl(_library, "gather_neurons", "CPU")
def _cpu(weight: Tensor, indices: Tensor, buffer: Tensor, *rest: Any) -> None:
    from graphopt.codegen.cpp import neurons as kernel

    _run(kernel, weight, indices, buffer, *rest)


def _run(
    kernel: Any,
    weight: Tensor,
    indices: Tensor,
    buffer: Tensor,
    dim: int = 0,
    fused: int = 1,
) -> None:
    if kernel.gathers(weight, buffer):
        kernel.gather(weight, places_of(weight, indices, dim, fused), buffer, dim)
    else:
        gather_reference(weight, indices, buffer, dim, fused)
