"""Build and call the C++ kernel that chooses pages and attends to them."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from graphopt.codegen.cpp.kernel import (
    Arguments,
    arguments,
    entry_point,
    fill,
    rows_text,
    supports,
)
from graphopt.codegen.cpp.pages import PageSetArguments, page_set, pages_text
from graphopt.codegen.pages import PAGE, width

_UNITS_A_THREAD = 4  # so that threads end at about the same time


class _PageArguments(ctypes.Structure):
    """Mirrors ``struct PageArguments`` of page_attention.cpp.in."""

    _fields_ = (
        ("base", Arguments),
        ("full", PageSetArguments),
        ("ring", PageSetArguments),
        *(
            (name, ctypes.c_void_p)
            for name in ("slot", "in_ring", "statistics", "selected", "selected_at")
        ),
        *((name, ctypes.c_void_p) for name in ("past", "parts")),
        *(
            (name, ctypes.c_int64)
            for name in ("new_tokens", "budget", "interval", "sink_pages", "ring_pages")
        ),
        ("splits", ctypes.c_int64),
    )


@cache
def emit() -> str:
    """Return the C++ source of the kernel."""
    parts = {"ROWS": rows_text(PAGE, 1), "PAGES": pages_text()}
    parts["PARTS"] = fill("parts.cpp.in", {})
    return fill("page_attention.cpp.in", parts)


@cache
def _kernel() -> Any:
    symbol = "graphopt_page_attention"
    return entry_point("page_attention", emit(), symbol, _PageArguments)


@cache
def _slots(heads: int, ring_heads: tuple[int, ...]) -> tuple[Any, Any]:
    """Return the place of each head in its set, and whether that is the ring."""
    full = [h for h in range(heads) if h not in ring_heads]
    slots = [(ring_heads if h in ring_heads else full).index(h) for h in range(heads)]
    rings = [h in ring_heads for h in range(heads)]
    return (ctypes.c_int32 * heads)(*slots), (ctypes.c_uint8 * heads)(*rings)


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
    """Run the kernel; shapes and arguments as `graphopt.ops.pages.attention`.

    ``full`` and ``ring`` are sets of pages: keys, values, their scales, table.

    Raises KernelError when the kernel cannot be built here.
    """
    full_set = page_set(*full)
    value_dim = width(full[1])
    batch, heads = query.shape[0], full_set.heads + len(ring_heads)
    out = query.new_empty((*query.shape[:3], value_dim))
    threads = torch.get_num_threads()
    splits = max(1, min(_UNITS_A_THREAD * threads // max(batch * heads, 1), 16))
    group = query.shape[1] // heads
    parts = torch.empty(batch * heads * splits * group * (value_dim + 2))
    base = arguments(query, query, query, out, key_mask, 0, scale, softcap)
    base.num_kv_heads, base.value_dim = heads, value_dim
    slot, in_ring = _slots(heads, tuple(ring_heads))
    filled = _PageArguments(
        base,
        full_set,
        PageSetArguments() if ring is None else page_set(*ring),
        *(ctypes.cast(t, ctypes.c_void_p) for t in (slot, in_ring)),
        *(t.data_ptr() for t in (statistics, selected, selected_at)),
        *(past.data_ptr(), parts.data_ptr()),
        *(new, budget, interval, sink_pages, ring_pages, splits),
    )
    _kernel()(ctypes.byref(filled))
    return out


__all__ = ["emit", "launch", "supports"]
