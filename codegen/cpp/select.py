"""Build and call the C++ kernel of vertical-slash selection."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch

from graphopt.codegen.cpp.kernel import (
    Arguments,
    arguments,
    entry_point,
    fill,
    rows_text,
    supports,
    table,
)
from graphopt.codegen.predicates import BLOCK

_KEY_BLOCK = 256


class _SelectArguments(ctypes.Structure):
    """Mirrors ``struct SelectArguments`` of select.cpp.in."""

    _fields_ = (
        ("base", Arguments),
        *(
            (name, ctypes.c_void_p)
            for name in ("first_row", "window", "vertical", "slash")
        ),
        *(
            (name, ctypes.c_int64)
            for name in ("last_rows", "run_capacity", "column_capacity")
        ),
        *(
            (name, ctypes.c_void_p)
            for name in ("runs", "run_count", "columns", "column_count")
        ),
    )


@cache
def emit() -> str:
    """Return the C++ source of the kernel."""
    rows = rows_text(_KEY_BLOCK, BLOCK)
    return fill("select.cpp.in", {"ROWS": rows, "BLOCK": str(BLOCK)})


@cache
def _kernel() -> Any:
    stem = "select_vertical_slash"
    return entry_point(stem, emit(), "graphopt_select", _SelectArguments)


def launch(
    query: torch.Tensor,
    key: torch.Tensor,
    key_mask: torch.Tensor | None,
    first_row: torch.Tensor,
    last_rows: int,
    tables: Sequence[Sequence[int]],
    lists: Sequence[torch.Tensor],
    query_offset: int,
    scale: float,
    softcap: float,
) -> None:
    """Fill ``lists`` (zeros of a `VisitList`'s shapes).

    ``first_row``: [B] int64, the query row with which the ``last_rows`` begin;
    ``tables``: sink, window, vertical, slash. Raises KernelError when the kernel
    cannot be built here.
    """
    heads = query.shape[1]
    runs, run_count, columns, column_count = lists
    filled = [table(values, heads) for values in tables]
    pointers = [ctypes.cast(t, ctypes.c_void_p) for t in filled]
    base = arguments(query, key, key, query, key_mask, query_offset, scale, softcap)
    base.sink = pointers[0]
    whole = _SelectArguments(
        base,
        first_row.data_ptr(),
        *pointers[1:],
        *(last_rows, runs.shape[2], columns.shape[2]),
        *(t.data_ptr() for t in (runs, run_count, columns, column_count)),
    )
    _kernel()(ctypes.byref(whole))


__all__ = ["emit", "launch", "supports"]
