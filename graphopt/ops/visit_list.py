"""Visit lists: which keys each block of query rows visits, the same for all blocks.

A list belongs to one query head of one batch row. A block of `BLOCK` query rows whose
first row stands at position m visits key k when

- k is one of the head's ``columns`` (vertical lines of the attention matrix), or
- m - k lies in one of its ``runs`` [near, far): a slash at distance d, seen by all rows
  of the block, is the run [d - BLOCK + 1, d + 1).

Of the visited keys each row sees those up to itself. One list serves every block, so
its size does not grow with the number of blocks (MInference's does: Jiang et al. 2024).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from graphopt.codegen.predicates import BLOCK
from graphopt.ops.block_list import BlockList, override


class VisitList(NamedTuple):
    """Tensors of int32; counts say how much of each capacity is used.

    ``runs``: [B, Hq, R, 2], near and far, disjoint and ascending. ``run_count``:
    [B, Hq]. ``columns``: [B, Hq, C], ascending, each once. ``column_count``: [B, Hq].
    """

    runs: Tensor
    run_count: Tensor
    columns: Tensor
    column_count: Tensor

    def visited(
        self,
        dense_rows: Sequence[int],
        query_len: int,
        kv_len: int,
        offset: int,
        blocks: BlockList | None = None,
    ) -> Tensor:
        """Return the mask that the lists mean, boolean [B, Hq, query_len, kv_len].

        Heads with a list in ``blocks`` visit its blocks alone. Blocks that hold one of
        the last ``dense_rows`` (one value a head or one for all) rows see every earlier
        key. Written out by hand, to check the kernels.
        """
        device = self.runs.device
        row = torch.arange(query_len, device=device)[:, None]
        key = torch.arange(kv_len, device=device)[None]
        distance = row // BLOCK * BLOCK + offset - key
        used = (
            torch.arange(self.runs.shape[2], device=device) < self.run_count[..., None]
        )
        seen = _in_runs(distance, self.runs, used)
        seen |= self._in_columns(key, device)
        seen = override(seen, blocks, query_len, kv_len, offset)
        tail = torch.tensor(list(dense_rows), device=device)[:, None, None]
        size = torch.tensor(_row_blocks(blocks), device=device)[:, None, None]
        block_end = (row // size + 1) * size
        seen |= block_end.clamp(max=query_len) > query_len - tail
        return seen & (key <= row + offset)

    def _in_columns(self, key: Tensor, device: torch.device) -> Tensor:
        capacity = torch.arange(self.columns.shape[2], device=device)
        used = capacity < self.column_count[..., None]
        found = (self.columns[..., None] == key) & used[..., None]
        return found.any(2)[:, :, None]


def _row_blocks(blocks: BlockList | None) -> list[int]:
    """Return the rows that visit alike, one value a head or one for all."""
    if blocks is None:
        return [BLOCK]
    return [BLOCK if index < 0 else blocks.block for index in blocks.heads]


def _in_runs(distance: Tensor, runs: Tensor, used: Tensor) -> Tensor:
    seen = torch.zeros(*runs.shape[:2], *distance.shape, dtype=torch.bool)
    seen = seen.to(distance.device)
    for index in range(runs.shape[2]):
        near, far = (runs[:, :, index, i, None, None] for i in range(2))
        inside = (distance >= near) & (distance < far)
        seen |= inside & used[:, :, index, None, None]
    return seen


def from_distances(kept: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Return (runs, run_count) of the slashes ``kept``, boolean [B, Hq, N].

    ``kept[..., d]`` keeps the keys d tokens before the query. A slash is widened to
    what a block's rows see of it together; runs that touch become one.
    """
    places = torch.nn.functional.pad(kept.int(), (0, BLOCK - 1)).cumsum(-1)
    before = torch.nn.functional.pad(places, (BLOCK, 0))[..., : places.shape[-1]]
    covered = places > before  # covered[y]: m - k = y - BLOCK + 1 is visited
    begins = covered & ~torch.nn.functional.pad(covered, (1, 0))[..., :-1]
    ends = covered & ~torch.nn.functional.pad(covered, (0, 1))[..., 1:]
    near, count = sorted_places(begins, capacity)
    far, _ = sorted_places(ends, capacity)
    runs = torch.stack((near - (BLOCK - 1), far - (BLOCK - 2)), -1)
    used = torch.arange(capacity, device=kept.device) < count[..., None]
    return runs.masked_fill(~used[..., None], 0), count


def sorted_places(kept: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Return (places, count): where ``kept`` [B, Hq, N] is true, ascending, int32.

    ``places``: [B, Hq, capacity], zero beyond the count. No host sync: places are
    scattered to their rank, the rest to a slot that is cut off.
    """
    rank = kept.cumsum(-1) - 1
    slot = torch.where(kept, rank, capacity).clamp(max=capacity)
    place = torch.arange(kept.shape[-1], device=kept.device, dtype=torch.int32)
    places = torch.zeros(
        *kept.shape[:-1], capacity + 1, dtype=torch.int32, device=kept.device
    )
    places.scatter_(-1, slot, place.expand_as(kept))
    count = kept.sum(-1).clamp(max=capacity).int()
    used = torch.arange(capacity, device=kept.device) < count[..., None]
    return places[..., :capacity].masked_fill(~used, 0), count
