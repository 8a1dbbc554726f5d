"""Choose pages and attend to them on Triton."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from graphopt.codegen.cache import load_python
from graphopt.codegen.pages import LOGICAL, PAGE, width
from graphopt.codegen.targets import Tile
from graphopt.codegen.triton.attention import on_device, require_runnable, supports
from graphopt.codegen.triton.interpreter import is_interpreted, repair_bfloat16_dot
from graphopt.codegen.triton.pages_append import require_contiguous
from graphopt.codegen.triton.pages_emit import emit_page_attention
from graphopt.codegen.triton.pages_spec import KINDS, PageAttentionSpec, padded

# About four a multiprocessor of the targets (108 to 304 of them): enough to keep loads
# in flight, few enough that the parts stay small beside the pages. One number for
# all devices: the order of additions, and with it the result, is the same on each.
_PROGRAMS = 512

_SCORED = 4096  # elements of statistics that a program of 4 warps holds, twice


@cache
def load(spec: PageAttentionSpec) -> ModuleType:
    """Write the kernels' file to the cache directory and import it."""
    if is_interpreted():
        repair_bfloat16_dot()
    return load_python(spec.name, emit_page_attention(spec))


def launch(
    query: Tensor,
    full: Any,
    ring: Any,
    ring_heads: Sequence[int],
    sink_pages: int,
    ring_pages: int,
    past: Tensor,
    new: int,
    statistics: Tensor,
    selected: Tensor,
    selected_at: Tensor,
    key_mask: Tensor | None,
    budget: int,
    interval: int,
    scale: float,
    softcap: float,
) -> Tensor:
    """Run the kernels; shapes and arguments as `graphopt.ops.pages.attention`.

    Four launches: scores of pages and the choice, which return at once where the last
    choice still holds, attention in splits, and their sum. Grids and scratch memory
    depend on the shapes of the tensors, on ``budget`` and on the ring alone, and never
    on the number of tokens: a CUDA graph of a step can be replayed for every later one
    (after one call outside of a capture, in which kernels are compiled and tables
    made). A head visits at most ``budget`` pages and the newest, also of a choice that
    a call with a larger budget made.

    Raises KernelError for a dtype or a device that has no kernel, and for tensors of
    the cache that are not contiguous.
    """
    require_runnable(query)
    sets = [t for t in (*full, *(ring or ())) if t is not None]
    require_contiguous([*sets, past, statistics, selected, selected_at])
    heads = full[0].shape[0] + len(ring_heads)
    spec = _spec(query, full, heads, ring is not None, key_mask, softcap)
    out = query.new_empty((*query.shape[:3], spec.value_dim))
    if out.numel() == 0:
        return out
    keep = (sink_pages, ring_pages) if ring else ()
    tables = _tables(heads, tuple(ring_heads), query.device) if ring else ()
    mask = [] if key_mask is None else [key_mask]
    cap = [softcap] if spec.has_softcap else []
    slots = _slots(budget, selected.shape[2], keep)
    splits = _splits(slots, query.shape[0] * heads)
    tile = attend_tile(spec)
    with torch.cuda.device_of(query):
        load(spec).launch(
            query, *sets, *tables, *keep, past, new, statistics,
            selected, selected_at, *mask, budget, interval, scale, *cap, out,
            score_block(spec), slots, splits, tile.block_n, **tile.options(),
        )  # fmt: skip
    return out


def _spec(
    query: Tensor,
    full: Any,
    heads: int,
    has_ring: bool,
    key_mask: Tensor | None,
    softcap: float,
) -> PageAttentionSpec:
    pool = full[1]
    return PageAttentionSpec(
        dtype=query.dtype,
        head_dim=query.shape[-1],
        value_dim=width(pool),
        kind=KINDS.get(pool.dtype, ""),
        has_ring=has_ring,
        group=query.shape[1] // heads,
        has_key_mask=key_mask is not None,
        has_softcap=softcap > 0,
    )


@cache
def _tables(
    heads: int, ring_heads: tuple[int, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Return the heads that keep all tokens, and the place of each head in its set.

    Places count from 0 on in the full set, and from -1 back in the ring.
    """
    full = [h for h in range(heads) if h not in ring_heads]
    places = [
        -1 - ring_heads.index(h) if h in ring_heads else full.index(h)
        for h in range(heads)
    ]
    return on_device(tuple(full), device), on_device(tuple(places), device)


def _slots(budget: int, pages: int, ring: Sequence[int]) -> int:
    """Return the most pages that a head visits: chosen and newest, or its ring's."""
    return max(1 + min(budget, pages), sum(ring))


def _splits(slots: int, heads: int) -> int:
    """Return how many programs share a head's pages, each with as many slots."""
    wanted = max(1, min(_PROGRAMS // heads, slots))
    return -(-slots // -(-slots // wanted))


def score_block(spec: PageAttentionSpec) -> int:
    """Return how many pages one program scores."""
    return max(1, _SCORED // (padded(spec.head_dim) * PAGE // LOGICAL))


def attend_tile(spec: PageAttentionSpec) -> Tile:
    """Return the tile of ``attend``: a page, or a part of one where it is wide.

    The widest that spill on no target (tests/codegen/triton/test_pages.py).
    """
    width = max(padded(spec.head_dim), padded(spec.value_dim))
    if spec.dtype == torch.float32:
        return Tile(padded(spec.group), 16, 4, 1)
    return Tile(padded(spec.group), PAGE if width <= 128 else PAGE // 2, 4, 2)


__all__ = ["attend_tile", "launch", "load", "score_block", "supports"]
