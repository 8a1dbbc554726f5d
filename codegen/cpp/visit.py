"""Build and call the C++ attention kernel over visit lists."""

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


class _VisitArguments(ctypes.Structure):
    """Mirrors ``struct VisitArguments`` of visit.cpp.in."""

    _fields_ = (
        ("base", Arguments),
        *(
            (name, ctypes.c_void_p)
            for name in ("runs", "run_count", "columns", "column_count", "dense_rows")
        ),
        ("run_capacity", ctypes.c_int64),
        ("column_capacity", ctypes.c_int64),
    )


@cache
def emit() -> str:
    """Return the C++ source of the kernel."""
    return fill("visit.cpp.in", {"ROWS": rows_text(_KEY_BLOCK, BLOCK)})


@cache
def _kernel() -> Any:
    return entry_point("visit_attention", emit(), "graphopt_visit", _VisitArguments)


def launch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor | None,
    lists: Sequence[torch.Tensor],
    dense_rows: Sequence[int],
    query_offset: int,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    """Run the kernel; shapes and arguments as `graphopt.ops.visit`.

    Raises KernelError when the kernel cannot be built here.
    """
    out = query.new_empty((*query.shape[:3], value.shape[-1]))
    runs, run_count, columns, column_count = (t.contiguous() for t in lists)
    rows = table(dense_rows, query.shape[1])
    filled = _VisitArguments(
        arguments(query, key, value, out, key_mask, query_offset, scale, softcap),
        *(t.data_ptr() for t in (runs, run_count, columns, column_count)),
        ctypes.cast(rows, ctypes.c_void_p),
        runs.shape[2],
        columns.shape[2],
    )
    _kernel()(ctypes.byref(filled))
    return out


__all__ = ["emit", "launch", "supports"]
