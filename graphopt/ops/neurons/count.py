"""``graphopt::count_neurons``: how many tokens have each neuron among their own.

CoreInfer (Wang et al. 2024), definition 1: a token's own neurons are the top share of
those that are active in it, the first of equals. Active is what is over zero; by size
(``absolute``), what is not zero. inner [B, S, F] (or the same flattened, [B * S, F]) is
what the down projection reads; mask bool [B, S], false for padding, or None; counts
int32 [R, F] are added to. A share is ``parts`` of `PARTS`, rounded up. No [tokens, F]
sort: the least value that counts is found from the bits of the floats.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphopt.codegen.neurons import PARTS

_CHUNK = 1024  # tokens that the reference sorts at once

_library = torch.library.Library("graphopt", "FRAGMENT")
_library.define(
    "count_neurons(Tensor inner, Tensor? mask, Tensor(a!) counts, int parts, "
    "bool absolute=False, int weight=1, bool fresh=False) -> ()"
)


def count_neurons(
    inner: Tensor,
    mask: Tensor | None,
    counts: Tensor,
    parts: int,
    absolute: bool = False,
    weight: int = 1,
    fresh: bool = False,
) -> None:
    """Call ``graphopt::count_neurons``; see the module.

    Each token counts ``weight`` times; ``fresh``: what ``counts`` held is forgotten.
    """
    args = (inner, mask, counts, parts, absolute, weight, fresh)
    torch.ops.graphopt.count_neurons(*args)


@torch.library.register_fake("graphopt::count_neurons", lib=_library)
def _fake(inner: Tensor, mask: Tensor | None, counts: Tensor, *_: Any) -> None:
    if counts.ndim != 2 or inner.shape[-1] != counts.shape[1]:
        raise ValueError(
            f"graphopt.count_neurons: counts {tuple(counts.shape)} are not of the "
            f"neurons of {tuple(inner.shape)}"
        )


def tokens_of(
    inner: Tensor, mask: Tensor | None, counts: Tensor
) -> tuple[Tensor, Tensor | None]:
    """Return inner as [R, N, F] and the mask as [R, N], of the rows of ``counts``."""
    shape = (counts.shape[0], -1, counts.shape[1])
    return inner.reshape(shape), None if mask is None else mask.reshape(shape[:2])


def count_reference(
    inner: Tensor,
    mask: Tensor | None,
    counts: Tensor,
    parts: int,
    absolute: bool = False,
    weight: int = 1,
    fresh: bool = False,
) -> None:
    """Count in plain ATen, by sorting, on any device; arguments as in the module."""
    if fresh:
        counts.zero_()
    rows, real = tokens_of(inner, mask, counts)
    for start in range(0, rows.shape[1], _CHUNK):
        own = own_neurons(rows[:, start : start + _CHUNK], parts, absolute)
        if real is not None:
            own = own & real[:, start : start + _CHUNK, None]
        counts.add_(own.sum(1, dtype=torch.int32) * weight)


def own_neurons(inner: Tensor, parts: int, absolute: bool) -> Tensor:
    """Return which neurons are the tokens' own, bool like inner [..., F]."""
    keys = inner.abs() if absolute else inner
    keys = torch.where(keys > 0, keys, 0)
    wanted = ((keys > 0).sum(-1, keepdim=True) * parts + PARTS - 1) // PARTS
    order = keys.sort(dim=-1, descending=True, stable=True).indices
    rank = torch.arange(inner.shape[-1], device=inner.device)
    return torch.zeros_like(order, dtype=torch.bool).scatter(-1, order, rank < wanted)


@torch.library.impl(_library, "count_neurons", "CUDA")
def _cuda(*inputs: Any) -> None:
    from graphopt.codegen.triton import neurons as kernel

    _run(kernel, *inputs)


@torch.library.impl(_library, "count_neurons", "CPU")
def _cpu(*inputs: Any) -> None:
    from graphopt.codegen.cpp import neurons as kernel

    _run(kernel, *inputs)


def _run(
    kernel: Any,
    inner: Tensor,
    mask: Tensor | None,
    counts: Tensor,
    parts: int,
    absolute: bool = False,
    weight: int = 1,
    fresh: bool = False,
) -> None:
    if not kernel.counts(inner):
        count_reference(inner, mask, counts, parts, absolute, weight, fresh)
        return
    if fresh:
        counts.zero_()
    rows, real = tokens_of(inner, mask, counts)
    kernel.count(rows, real, counts, parts, absolute, weight)
