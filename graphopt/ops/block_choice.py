"""Which blocks one kind of heads keeps, chunk by chunk of row blocks, in plain ATen."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

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
from graphopt.ops.block_runs import refine, runs_of

# Elements of the map that is held at once, for all heads of a kind together.
_HELD = 1 << 24

_Choose = Callable[[range], Tensor]


def select_kind(
    lists: BlockList,
    kind: Kind,
    query: Tensor,
    key: Tensor,
    key_mask: Tensor | None,
    offset: int,
    scale: float,
    softcap: float,
) -> None:
    """Write the lists of the heads of ``kind``; ``lists`` holds zeros."""
    grid = Grid(query.shape[2], key.shape[2], offset, kind.block)
    query, key = _heads(query, key, kind.heads)
    real = real_rows(grid, key_mask, query), real_keys(grid, key_mask, key)
    query, key = zero_padded(query, real[0]), zero_padded(key, real[1])
    choose = _block_sparse(kind, grid, query, key, real, scale)
    if kind.stride:
        choose = _antidiagonal(kind, grid, query, key, real, scale, softcap)
    held = query.shape[0] * len(kind.heads) * grid.keys
    held *= (kind.block // kind.stride) ** 2 if kind.stride else 1
    step = max(1, _HELD // max(held, 1))
    for first in range(0, grid.rows, step):
        rows = range(first, min(first + step, grid.rows))
        _write(lists, kind, grid, rows, choose(rows))


def _heads(query: Tensor, key: Tensor, heads: Sequence[int]) -> tuple[Tensor, Tensor]:
    """Return the queries of ``heads`` and their keys, shared where groups are whole.

    Without indexing by a tensor, which would be copied to the device.
    """
    group = query.shape[1] // key.shape[1]
    owners = [head // group for head in heads]
    if list(heads) != list(range(query.shape[1])):
        query = torch.stack([query[:, head] for head in heads], 1)
        key = torch.stack([key[:, owner] for owner in owners], 1)
    return query, key


def _antidiagonal(
    kind: Kind,
    grid: Grid,
    query: Tensor,
    key: Tensor,
    real: tuple[Tensor, Tensor],
    scale: float,
    softcap: float,
) -> _Choose:
    def choose(rows: range) -> Tensor:
        forced = grid.forced(rows, query.device)
        seen = grid.seen(rows, query.device) & _with_key(grid, real[1])[:, None, None]
        if kind.threshold >= 1.0:
            seen = seen | forced
            return seen.expand(query.shape[0], query.shape[1], -1, -1)
        mass = antidiagonal_mass(
            query, key, real, grid, rows, kind.stride, scale, softcap
        )
        return keep_mass(mass, forced, kind.threshold)

    return choose


def _block_sparse(
    kind: Kind,
    grid: Grid,
    query: Tensor,
    key: Tensor,
    real: tuple[Tensor, Tensor],
    scale: float,
) -> _Choose:
    means = block_means(query, real[0], grid.block)
    key_means = block_means(key, real[1], grid.block)

    def choose(rows: range) -> Tensor:
        span = slice(rows.start, rows.stop)
        scores = pooled_scores(means[:, :, span], key_means, scale)
        forced = grid.forced(rows, query.device)
        seen = grid.seen(rows, query.device) & _with_key(grid, real[1])[:, None, None]
        scores = scores.masked_fill(~seen | scores.isnan(), float("-inf"))
        return keep_best(scores, forced, kind.blocks)

    return choose


def _with_key(grid: Grid, real: Tensor) -> Tensor:
    return real.unflatten(1, (-1, grid.block)).any(-1)


def keep_mass(mass: Tensor, forced: Tensor, threshold: float) -> Tensor:
    """Return the forced blocks and the heaviest others, boolean like ``mass`` [.., K].

    Others are added until the sum of all kept reaches ``threshold`` of the total.
    """
    wanted = threshold * mass.sum(-1, keepdim=True)
    have = mass.masked_fill(~forced, 0.0).sum(-1, keepdim=True)
    rest = mass.masked_fill(forced, 0.0).sort(dim=-1, descending=True, stable=True)
    before = have + rest.values.cumsum(-1) - rest.values
    kept = torch.zeros_like(mass, dtype=torch.bool)
    return (
        kept.scatter(-1, rest.indices, (before < wanted) & (rest.values > 0)) | forced
    )


def keep_best(scores: Tensor, forced: Tensor, blocks: int) -> Tensor:
    """Return the forced blocks and the best others, ``blocks`` in all, [.., K].

    Scores of -inf are never kept for their worth; of equal ones the first are.
    """
    rest = scores.masked_fill(forced, float("-inf"))
    best = rest.sort(dim=-1, descending=True, stable=True)
    rank = torch.arange(scores.shape[-1], device=scores.device)
    room = blocks - forced.sum(-1, keepdim=True)
    kept = torch.zeros_like(scores, dtype=torch.bool)
    wanted = (rank < room) & (best.values > float("-inf"))
    return kept.scatter(-1, best.indices, wanted) | forced


def _write(lists: BlockList, kind: Kind, grid: Grid, rows: range, kept: Tensor) -> None:
    factor = kind.block // lists.block
    target, count = lists.key_blocks, lists.key_block_count
    first = rows.start * factor
    last = min(rows.stop * factor, -(-grid.query_len // lists.block))
    refined = refine(kept, factor, last - first, -(-grid.kv_len // lists.block))
    runs, found = runs_of(refined, target.shape[3])
    for place, head in enumerate(kind.heads):
        target[:, lists.heads[head], first:last] = runs[:, place]
        count[:, lists.heads[head], first:last] = found[:, place]
