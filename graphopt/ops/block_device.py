"""Which blocks one kind of heads keeps, on a GPU: Triton, where the map is not a GEMM.

`graphopt.ops.block_choice` sorts every row of the map of blocks twice and writes runs
through a dozen maps as large; here one launch chooses and writes. The antidiagonal
estimate is one launch more, of whose strided map nothing is stored; the block-sparse
one is a product of means in ATen. Antidiagonal heads have queries and keys copied only
where a mask hides some.
"""

from __future__ import annotations

from torch import Tensor

from graphopt.codegen.triton import select_blocks as triton_select
from graphopt.codegen.triton import select_strided
from graphopt.codegen.triton.select_blocks import Choice, supports
from graphopt.ops.block_choice import _heads, _with_key
from graphopt.ops.block_estimate import (
    Grid,
    block_means,
    pooled_scores,
    real_keys,
    real_rows,
    zero_padded,
)
from graphopt.ops.block_kinds import Kind
from graphopt.ops.block_list import BlockList

# Elements of the map of blocks that is held at once, 256 MB: 32 heads of 128 thousand
# tokens in one part.
_HELD = 1 << 26


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
    real = real_rows(grid, key_mask, query), real_keys(grid, key_mask, key)
    if kind.stride:
        given = query, key
        if key_mask is not None:
            given = zero_padded(query, real[0]), zero_padded(key, real[1])
        for rows in _parts(query.shape[0], kind, grid):
            mass = select_strided.masses(
                *given, real, kind.heads, kind.stride, rows, grid.query_len, offset,
                scale, softcap,
            )  # fmt: skip
            _launch(lists, kind, grid, "mass", rows, mass, None)
        return
    query, key = _heads(query, key, kind.heads)
    means = block_means(zero_padded(query, real[0]), real[0], grid.block)
    key_means = block_means(zero_padded(key, real[1]), real[1], grid.block)
    for rows in _parts(query.shape[0], kind, grid):
        scores = pooled_scores(means[:, :, rows.start : rows.stop], key_means, scale)
        _launch(lists, kind, grid, "best", rows, scores, shown)


def _parts(batch: int, kind: Kind, grid: Grid) -> list[range]:
    """Return the row blocks whose map of blocks is held at once."""
    step = max(1, _HELD // max(batch * len(kind.heads) * grid.keys, 1))
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
