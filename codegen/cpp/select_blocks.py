"""Build and call the C++ kernel of block selection."""

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

# Keys of a tile of the strided map, where all rows see it and where some do; strided
# rows of a tile.
_STRETCH, _EDGE, _STACK = 2048, 256, 192
_STRIDED_BLOCK, _POOLED_BLOCK = 128, 64


class _BlockArguments(ctypes.Structure):
    """Mirrors ``struct BlockArguments`` of select_blocks.cpp.in."""

    _fields_ = (
        ("base", Arguments),
        *(
            (name, ctypes.c_void_p)
            for name in ("blocks", "stride", "list", "threshold")
        ),
        *(
            (name, ctypes.c_int64)
            for name in ("lists", "block", "row_capacity", "run_capacity")
        ),
        ("runs", ctypes.c_void_p),
        ("count", ctypes.c_void_p),
    )


@cache
def emit() -> str:
    """Return the C++ source of the kernel."""
    sizes = {"STRETCH": str(_STRETCH), "EDGE": str(_EDGE), "STACK": str(_STACK)}
    parts = {
        "ROWS": rows_text(_STRETCH, _STACK),
        "CHOICE": fill("block_choice.cpp.in", {}),
        "ANTIDIAGONAL": fill("antidiagonal.cpp.in", sizes),
        "SPARSE": fill("block_sparse.cpp.in", {}),
        "STRIDED": str(_STRIDED_BLOCK),
        "POOLED": str(_POOLED_BLOCK),
    }
    return fill("select_blocks.cpp.in", parts)


@cache
def _kernel() -> Any:
    return entry_point(
        "select_blocks", emit(), "graphopt_select_blocks", _BlockArguments
    )


def launch(
    query: torch.Tensor,
    key: torch.Tensor,
    key_mask: torch.Tensor | None,
    tables: tuple[Sequence[int], Sequence[int], Sequence[float]],
    lists: tuple[torch.Tensor, torch.Tensor],
    list_of: Sequence[int],
    block: int,
    query_offset: int,
    scale: float,
    softcap: float,
) -> None:
    """Fill ``lists`` (zeros), key_blocks and key_block_count of a `BlockList`.

    ``tables``: blocks, stride and threshold, as in `graphopt.ops.block_selection`;
    ``list_of``: the list of each head, -1 for none. Raises KernelError when the kernel
    cannot be built here.
    """
    heads = query.shape[1]
    blocks, stride, threshold = tables
    thresholds = (ctypes.c_double * heads)(*(list(threshold) * heads)[:heads])
    filled = [table(t, heads) for t in (blocks, stride, list_of)] + [thresholds]
    runs, count = lists
    whole = _BlockArguments(
        arguments(query, key, key, query, key_mask, query_offset, scale, softcap),
        *(ctypes.cast(t, ctypes.c_void_p) for t in filled),
        *(runs.shape[1], block, runs.shape[2], runs.shape[3]),
        *(runs.data_ptr(), count.data_ptr()),
    )
    _kernel()(ctypes.byref(whole))


__all__ = ["emit", "launch", "supports"]
