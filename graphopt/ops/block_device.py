"""Which blocks one kind of heads keeps, on a GPU: worths in ATen, the choice in Triton.

`graphopt.ops.block_choice` sorts every row of the map twice and writes runs through a
dozen maps as large; here one launch for each part of the map chooses and writes. The
worths are products and sums of `graphopt.ops.block_estimate`, a part at a time.
"""

from __future__ import annotations

from torch import Tensor

from graphopt.codegen.triton import select_blocks as triton_select
from graphopt.codegen.triton.select_blocks import Choice, supports
from graphopt.ops.block_choice import _HELD, _heads, _with_key
from graphopt.ops.block_estimate import (
    Grid,
    antidiagonal_mass,
    block_means,
    pooled_scores,
    real_keys,
    real_rows,
    zero_padded,
)
from graphopt.ops.block_kinds import Kind
from graphopt.ops.block_list import BlockList


def select_kind_on_device(
    lists: BlockList,
    kind: Kind,
    query: Tensor,
    key: Tensor,
    key_mask: Tensor | None,
    offset: int,
    scale: float,
    softcap: float,
) -> None:
    """Write the lists of the heads of ``kind``; ``lists`` holds zeros.

    As `graphopt.ops.block_choice.select_kind`, and with its arguments.
    """
    grid = Grid(query.shape[2], key.shape[2], offset, kind.block)
    shown = _with_key(grid, real_keys(grid, key_mask, key))
    if kind.stride and kind.threshold >= 1.0:
        _launch(lists, kind, grid, "all", range(grid.rows), None, shown)
        return
    query, key = _heads(query, key, kind.heads)
    real = real_rows(grid, key_mask, query), real_keys(grid, key_mask, key)
    query, key = zero_padded(query, real[0]), zero_padded(key, real[1])
    if not kind.stride:
        means = block_means(query, real[0], grid.block)
        key_means = block_means(key, real[1], grid.block)
        for rows in _parts(query, kind, grid):
            own = means[:, :, rows.start : rows.stop]
            scores = pooled_scores(own, key_means, scale)
            _launch(lists, kind, grid, "best", rows, scores, shown)
        return
    for rows in _parts(query, kind, grid):
        mass = antidiagonal_mass(
            query, key, real, grid, rows, kind.stride, scale, softcap
        )
        _launch(lists, kind, grid, "mass", rows, mass, None)


def _parts(query: Tensor, kind: Kind, grid: Grid) -> list[range]:
    """Return the row blocks whose map, strided or not, is held at once."""
    held = query.shape[0] * len(kind.heads) * grid.keys
    held *= (kind.block // kind.stride) ** 2 if kind.stride else 1
    step = max(1, _HELD // max(held, 1))
    starts = range(0, grid.rows, step)
    return [range(first, min(first + step, grid.rows)) for first in starts]


def _launch(
    lists: BlockList,
    kind: Kind,
    grid: Grid,
    choice: Choice,
    rows: range,
    worth: Tensor | None,
    shown: Tensor | None,
) -> None:
    triton_select.launch(
        choice,
        kind.threshold if kind.stride else kind.blocks,
        worth,
        shown,
        (lists.key_blocks, lists.key_block_count),
        tuple(lists.heads[head] for head in kind.heads),
        rows,
        (grid.query_len, grid.kv_len, grid.offset),
        kind.block,
        lists.block,
    )


__all__ = ["select_kind_on_device", "supports"]
