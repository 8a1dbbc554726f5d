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
from graphopt.codegen.cpp.pattern import pattern_text

_KEY_BLOCK, _ROW_BLOCK = 256, 192


@cache
def emit(pattern: str) -> str:
    """Return the C++ source of the kernel for ``pattern``."""
    parts = {
        "ROWS": rows_text(_KEY_BLOCK, _ROW_BLOCK),
        "KEYS": pattern_text(pattern),
        "PATTERN": pattern,
    }
    return fill("attention.cpp.in", parts)


class _PackedArguments(ctypes.Structure):
    """Mirrors ``struct PackedArguments`` of attention.cpp.in."""

    _fields_ = (
        ("base", Arguments),
        *((name, ctypes.c_void_p) for name in ("starts", "lengths")),
        ("prompts", ctypes.c_int64),
    )


@cache
def _kernel(pattern: str, packed: bool = False) -> Any:
    stem = f"attention_{pattern.replace('-', '_')}"
    symbol = "graphopt_packed_attention" if packed else "graphopt_attention"
    structure = _PackedArguments if packed else Arguments
    return entry_point(stem, emit(pattern), symbol, structure)


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
    out = query.new_empty((*query.shape[:3], value.shape[-1]))
    filled = arguments(query, key, value, out, key_mask, query_offset, scale, softcap)
    tables = _tables(filled, sink, window)
    _kernel(pattern)(ctypes.byref(filled))
    del tables
    return out


def _tables(filled: Arguments, sink: Sequence[int], window: Sequence[int]) -> Any:
    """Point ``filled`` to its tables; they must live until the call."""
    tables = [table(values, filled.num_heads) for values in (sink, window)]
    filled.sink, filled.window = (ctypes.cast(t, ctypes.c_void_p) for t in tables)
    return tables


def launch_packed(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    lengths: torch.Tensor,
    longest: int,
    key_mask: torch.Tensor | None,
    pattern: str,
    sink: Sequence[int],
    window: Sequence[int],
    scale: float,
    softcap: float,
    out: torch.Tensor,
) -> None:
    """Run all prompts of a packed row; as `graphopt.ops.packed`, tensors of one row.

    ``out`` [1, Hq, N, Dv] may have any strides but that of its channels, and keeps what
    it had where there is no prompt. Raises KernelError when the kernel cannot be built.
    """
    base = arguments(query, key, value, out, key_mask, 0, scale, softcap)
    tables = _tables(base, sink, window)
    where = (starts.data_ptr(), lengths.data_ptr(), starts.numel())
    _kernel(pattern, packed=True)(ctypes.byref(_PackedArguments(base, *where)))
    del tables


__all__ = ["emit", "launch", "launch_packed", "supports"]
