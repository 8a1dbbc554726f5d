"""Build and call the C++ kernel that writes keys and values into pages."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from graphopt.codegen.cpp.kernel import DTYPES, entry_point, fill, supports
from graphopt.codegen.pages import LOGICAL, PAGE, SPREAD

_KINDS = {torch.int8: 1, torch.uint8: 2}


class PageSetArguments(ctypes.Structure):
    """Mirrors ``struct PageSet`` of pages.hpp.in."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("keys", "values", "key_scales", "value_scales", "table")
        ),
        *((name, ctypes.c_int64) for name in ("heads", "pages", "width", "kind")),
    )


class _AppendArguments(ctypes.Structure):
    """Mirrors ``struct AppendArguments`` of append.cpp.in."""

    _fields_ = (
        ("set", PageSetArguments),
        *(
            (name, ctypes.c_void_p)
            for name in ("key", "value", "past", "starts", "statistics")
        ),
        *((f"{name}_strides", ctypes.c_int64 * 4) for name in ("key", "value")),
        *(
            (name, ctypes.c_int64)
            for name in ("batch", "length", "key_dim", "value_dim", "dtype", "threads")
        ),
        *(
            (name, ctypes.c_int64)
            for name in ("sink_pages", "ring_pages", "extremes", "wrong_row")
        ),
    )


def page_set(
    keys: Tensor,
    values: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
    table: Tensor,
) -> PageSetArguments:
    """Return a set of pages, shapes as `graphopt.ops.pages.layout`, all contiguous."""
    return PageSetArguments(
        keys.data_ptr(),
        values.data_ptr(),
        *(None if s is None else s.data_ptr() for s in (key_scales, value_scales)),
        table.data_ptr(),
        *(keys.shape[0], keys.shape[1], table.shape[1], _KINDS.get(keys.dtype, 0)),
    )


def pages_text() -> str:
    """Return the part of a kernel that knows how pages are laid out."""
    return fill("pages.hpp.in", {"PAGE": str(PAGE), "LOGICAL": str(LOGICAL)})


@cache
def emit_append() -> str:
    """Return the C++ source of the kernel."""
    return fill("append.cpp.in", {"PAGES": pages_text(), "SPREAD": str(SPREAD)})


@cache
def _append() -> Any:
    symbol = "graphopt_append"
    return entry_point("append_pages", emit_append(), symbol, _AppendArguments)


def append(
    key: Tensor,
    value: Tensor,
    past: Tensor,
    table: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
    statistics: Tensor | None,
    sink_pages: int = 0,
    ring_pages: int = 0,
    extremes: bool = True,
) -> None:
    """Run the kernel; shapes and arguments as `graphopt.ops.pages.append`.

    Raises KernelError when the kernel cannot be built here.
    """
    table, past = table.contiguous(), past.contiguous()
    pages = page_set(key_pages, value_pages, key_scales, value_scales, table)
    keep = (sink_pages, ring_pages, extremes)
    filled = _filled(key, value, past, None, pages, statistics, *keep)
    _append()(ctypes.byref(filled))


def append_ragged(
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    past: Tensor,
    table: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
) -> None:
    """Run the kernel; shapes and arguments as `graphopt.ops.pages.ragged_append`.

    Raises KernelError when the kernel cannot be built here, ValueError for a row that
    the call or its table has no place for.
    """
    starts, past, table = (t.contiguous() for t in (starts, past, table))
    pages = page_set(key_pages, value_pages, key_scales, value_scales, table)
    filled = _filled(key, value, past, starts, pages, None, 0, 0, 0)
    _append()(ctypes.byref(filled))
    if filled.wrong_row >= 0:
        row = (filled.wrong_row, starts, past, table, key.shape[2])
        raise misplaced("append_ragged", *row)


def _filled(
    key: Tensor,
    value: Tensor,
    past: Tensor,
    starts: Tensor | None,
    pages: PageSetArguments,
    statistics: Tensor | None,
    *keep: int,
) -> _AppendArguments:
    length, dim = key.shape[2:]
    return _AppendArguments(
        pages,
        *(key.data_ptr(), value.data_ptr(), past.data_ptr()),
        *(None if t is None else t.data_ptr() for t in (starts, statistics)),
        *((ctypes.c_int64 * 4)(*t.stride()) for t in (key, value)),
        *(len(past), length, dim, value.shape[-1]),
        *(DTYPES[key.dtype], torch.get_num_threads()),
        *(*keep, -1),
    )


def misplaced(
    name: str, row: int, starts: Tensor, past: Tensor, table: Tensor, tokens: int
) -> ValueError:
    """Return the error of a row for whose tokens a call has no place."""
    begin, end = starts[row : row + 2].tolist()
    return ValueError(
        f"graphopt.{name}: row {row} has tokens {begin} to {end} of {tokens} behind "
        f"{int(past[row])} in pages for {table.shape[1] * PAGE}; starts must ascend up "
        "to the call's tokens, and a row's table have pages for all of its own"
    )


__all__ = [
    "append",
    "append_ragged",
    "emit_append",
    "misplaced",
    "page_set",
    "pages_text",
    "supports",
]
