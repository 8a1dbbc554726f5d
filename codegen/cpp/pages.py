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
        *((name, ctypes.c_void_p) for name in ("key", "value", "past", "statistics")),
        *((f"{name}_strides", ctypes.c_int64 * 4) for name in ("key", "value")),
        *(
            (name, ctypes.c_int64)
            for name in ("batch", "length", "key_dim", "value_dim", "dtype", "threads")
        ),
        *((name, ctypes.c_int64) for name in ("sink_pages", "ring_pages", "extremes")),
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
    batch, _, length, dim = key.shape
    table, past = table.contiguous(), past.contiguous()
    filled = _AppendArguments(
        page_set(key_pages, value_pages, key_scales, value_scales, table),
        *(key.data_ptr(), value.data_ptr(), past.data_ptr()),
        None if statistics is None else statistics.data_ptr(),
        *((ctypes.c_int64 * 4)(*t.stride()) for t in (key, value)),
        *(batch, length, dim, value.shape[-1]),
        *(DTYPES[key.dtype], torch.get_num_threads()),
        *(sink_pages, ring_pages, extremes),
    )
    _append()(ctypes.byref(filled))


__all__ = ["append", "emit_append", "page_set", "pages_text", "supports"]
