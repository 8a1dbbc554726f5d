"""Emit, build and call the C++ attention kernel of a pattern."""

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
from graphopt.codegen.predicates import KeyRun, intervals, key_runs, predicate
from graphopt.codegen.printers import to_cpp

_KEY_BLOCK, _ROW_BLOCK = 256, 192


@cache
def emit(pattern: str) -> str:
    """Return the C++ source of the kernel for ``pattern``."""
    pred = predicate(pattern)
    runs = key_runs(pred)
    parts = {
        "PATTERN": pattern,
        "PREDICATE": to_cpp(pred.expr),
        "ROWS": rows_text(_KEY_BLOCK, _ROW_BLOCK),
        "RUN_COUNT": str(len(runs)),
        "RUNS": "\n".join(_print_run(i, run) for i, run in enumerate(runs)),
        "VISIBLE": "\n".join(_print_visible(i) for i in intervals(pred)),
    }
    return fill("attention.cpp.in", parts)


def _print_run(index: int, run: KeyRun) -> str:
    bounds = (run.begin, run.end, run.full_begin, run.full_end)
    values = ", ".join("kv_len" if b is None else to_cpp(b) for b in bounds)
    return f"  runs[{index}] = {{{values}}};"


def _print_visible(interval: Any) -> str:
    lower = "0" if interval.lower is None else to_cpp(interval.lower)
    upper = "kv_len" if interval.upper is None else to_cpp(interval.upper)
    return f"  visible({lower}, {upper});"


@cache
def _kernel(pattern: str) -> Any:
    stem = f"attention_{pattern.replace('-', '_')}"
    return entry_point(stem, emit(pattern), "graphopt_attention", Arguments)


def launch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor | None,
    pattern: str,
    sink: Sequence[int],
    window: Sequence[int],
    query_offset: int,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    """Run the kernel; shapes and arguments as `graphopt.ops.attention`.

    Raises KernelError when the kernel cannot be built here.
    """
    heads = query.shape[1]
    out = query.new_empty((*query.shape[:3], value.shape[-1]))
    filled = arguments(query, key, value, out, key_mask, query_offset, scale, softcap)
    sinks, windows = table(sink, heads), table(window, heads)
    filled.sink = ctypes.cast(sinks, ctypes.c_void_p)
    filled.window = ctypes.cast(windows, ctypes.c_void_p)
    _kernel(pattern)(ctypes.byref(filled))
    return out


__all__ = ["emit", "launch", "supports"]
