"""Build and call the C++ attention kernel over visit lists."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import torch

from graphopt.codegen.block_lists import BlockLists
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
        *(
            (name, ctypes.c_void_p)
            for name in ("key_blocks", "key_block_count", "block_heads")
        ),
        *(
            (name, ctypes.c_int64)
            for name in ("block_lists", "block", "row_blocks", "block_capacity")
        ),
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
    blocks: BlockLists | None = None,
) -> torch.Tensor:
    """Run the kernel; shapes and arguments as `graphopt.ops.visit`.

    Raises KernelError when the kernel cannot be built here.
    """
    out = query.new_empty((*query.shape[:3], value.shape[-1]))
    runs, run_count, columns, column_count = (t.contiguous() for t in lists)
    rows = table(dense_rows, query.shape[1])
    given = _block_fields(blocks, query.shape[1])
    filled = _VisitArguments(
        arguments(query, key, value, out, key_mask, query_offset, scale, softcap),
        *(t.data_ptr() for t in (runs, run_count, columns, column_count)),
        ctypes.cast(rows, ctypes.c_void_p),
        runs.shape[2],
        columns.shape[2],
        *given.fields,
    )
    _kernel()(ctypes.byref(filled))
    return out


class _Given(NamedTuple):
    """The last fields of the arguments, and what must live as long as they do."""

    fields: tuple[Any, ...]
    owners: tuple[Any, ...]


def _block_fields(blocks: BlockLists | None, heads: int) -> _Given:
    if blocks is None:
        none = table([-1], heads)
        places = (None, None, ctypes.cast(none, ctypes.c_void_p))
        return _Given((*places, 0, BLOCK, 0, 0), (none,))
    key_blocks, counts, list_of, block = blocks
    lists = [key_blocks.contiguous(), counts.contiguous()]
    own = table(list_of, heads)
    pointers = (*(t.data_ptr() for t in lists), ctypes.cast(own, ctypes.c_void_p))
    _, count, rows, capacity, _ = lists[0].shape
    return _Given((*pointers, count, block, rows, capacity), (*lists, own))


__all__ = ["emit", "launch", "supports"]
