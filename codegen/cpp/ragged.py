"""Build and call the C++ kernel in which a ragged batch attends to its pages."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

from torch import Tensor

from graphopt.codegen.cpp.kernel import (
    Arguments,
    arguments,
    entry_point,
    fill,
    rows_text,
    supports,
    table,
)
from graphopt.codegen.cpp.pages import (
    PageSetArguments,
    misplaced,
    page_set,
    pages_text,
)
from graphopt.codegen.cpp.pattern import pattern_text
from graphopt.codegen.pages import PAGE, width

_KEY_BLOCK, _ROW_BLOCK = 4 * PAGE, 192


class _RaggedArguments(ctypes.Structure):
    """Mirrors ``struct RaggedArguments`` of ragged.cpp.in."""

    _fields_ = (
        ("base", Arguments),
        ("set", PageSetArguments),
        *((name, ctypes.c_void_p) for name in ("starts", "past")),
        *((name, ctypes.c_int64) for name in ("rows", "wrong_row")),
    )


@cache
def emit(pattern: str) -> str:
    """Return the C++ source of the kernel for ``pattern``."""
    parts = {
        "PAGES": pages_text(),
        "ROWS": rows_text(_KEY_BLOCK, _ROW_BLOCK),
        "KEYS": pattern_text(pattern),
        "PARTS": fill("parts.cpp.in", {}),
        "PATTERN": pattern,
    }
    return fill("ragged.cpp.in", parts)


@cache
def _kernel(pattern: str) -> Any:
    stem = f"ragged_{pattern.replace('-', '_')}"
    return entry_point(stem, emit(pattern), "graphopt_ragged", _RaggedArguments)


def launch(
    query: Tensor,
    starts: Tensor,
    past: Tensor,
    page_table: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
    pattern: str,
    sink: Sequence[int],
    window: Sequence[int],
    scale: float,
    softcap: float,
) -> Tensor:
    """Run the kernel; shapes and arguments as `graphopt.ops.pages.ragged`.

    Raises ValueError for a row that the call or its table has no place for, KernelError
    when the kernel cannot be built here.
    """
    heads, kv_heads = query.shape[1], key_pages.shape[0]
    out = query.new_empty((*query.shape[:3], width(value_pages)))
    starts, past, page_table = (t.contiguous() for t in (starts, past, page_table))
    base = arguments(query, query, query, out, None, 0, scale, softcap)
    base.num_kv_heads, base.value_dim = kv_heads, width(value_pages)
    sinks, windows = table(sink, heads), table(window, heads)
    base.sink = ctypes.cast(sinks, ctypes.c_void_p)
    base.window = ctypes.cast(windows, ctypes.c_void_p)
    filled = _RaggedArguments(
        base,
        page_set(key_pages, value_pages, key_scales, value_scales, page_table),
        *(starts.data_ptr(), past.data_ptr(), len(past), -1),
    )
    _kernel(pattern)(ctypes.byref(filled))
    if filled.wrong_row >= 0:
        row = (filled.wrong_row, starts, past, page_table, query.shape[2])
        raise misplaced("ragged_page_attention", *row)
    return out


__all__ = ["emit", "launch", "pattern_text", "supports"]
