"""What decoding chooses pages by, beside vLLM's cache and numbered like its blocks.

A page is `PAGE` tokens, as in `graphopt.Cache`: vLLM's block, or an equal part of it.
Statistics of keys go by block, so they follow a block to its next request, which writes
it from the first token on, and serve all requests that share its tokens. The last
choice of a request is kept by the block that its newest token is in, which no other
request writes to.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.integrations.vllm.paged import Which, blocks
from graphopt.ops.pages import LOGICAL, PAGE
from graphopt.ops.pages.append import least_and_greatest, mean_and_spread

_PARTS = PAGE // LOGICAL


@dataclass(frozen=True)
class Parts:
    """Stretches of `LOGICAL` tokens, int64 [P]: block, place in it, tokens it holds."""

    block: Tensor
    place: Tensor
    held: Tensor

    @staticmethod
    def of(starts: Tensor, past: Tensor, table: Tensor) -> Parts:
        """Return the parts that the new tokens of rows lie in.

        Shapes: starts [R + 1], past [R], table [R, M].
        """
        new = starts[1:] - starts[:-1]
        total, first = past + new, past // LOGICAL
        count = torch.where(new > 0, (total - 1) // LOGICAL - first + 1, 0)
        row = torch.repeat_interleave(torch.arange(len(past)), count)
        before = (count.cumsum(0) - count)[row]
        part = (first[row] + torch.arange(len(row)) - before).long()
        held = (total[row] - part * LOGICAL).clamp(max=LOGICAL)
        return Parts(table[row, part // _PARTS].long(), part % _PARTS, held)


@dataclass
class Bounds:
    """One layer's, for a cache of N blocks and H heads.

    ``statistics`` [1, N * H * 2, PAGE / LOGICAL, 2, D] as in
    `graphopt.ops.pages.layout`, for pages numbered as the kernel sees them (block,
    head, key or value): those of values are never written. ``selected`` int32
    [N * H, pages] and ``selected_at`` int32 [N * H]: the last choice.
    """

    statistics: Tensor
    selected: Tensor
    selected_at: Tensor
    extremes: bool

    @staticmethod
    def beside(cache: Tensor, pages: int, extremes: bool) -> Bounds:
        """Return room for choices of up to ``pages`` pages of each block of ``cache``.

        ``extremes``: judge by the ends of each channel, else by mean and spread.
        """
        count, heads, _, _, channels = blocks(cache).shape
        places = count * heads
        return Bounds(
            cache.new_empty((1, 2 * places, _PARTS, 2, channels)),
            torch.full((places, pages), -1, dtype=torch.int32),
            torch.full((places,), -1, dtype=torch.int32),
            extremes,
        )

    def fits(self, cache: Tensor) -> bool:
        """Tell whether these are of a cache of such a size."""
        return cache.shape[0] * cache.shape[1] == len(self.selected_at)

    def judge(self, cache: Tensor, parts: Parts) -> None:
        """Judge ``parts`` by the keys that lie in ``cache``."""
        keys = blocks(cache)[:, :, 0].unflatten(2, (_PARTS, LOGICAL))
        read = keys[parts.block, :, parts.place]  # [P, H, LOGICAL, D]
        held = torch.arange(LOGICAL) < parts.held[:, None]
        how = least_and_greatest if self.extremes else mean_and_spread
        found = torch.stack(how(read, held[:, None, :, None]), 2)
        count, heads = cache.shape[:2]
        kept = self.statistics.view(count, heads, 2, *self.statistics.shape[2:])
        kept[:, :, 0][parts.block, :, parts.place] = found.to(kept.dtype)

    def forget(self, which: Which, heads: int) -> None:
        """Let requests that have read more of a prompt choose anew."""
        starts, past, table = which
        last = past + starts[1:] - starts[:-1] - 1
        self.selected_at[self.places(table, last, heads).flatten()] = -1

    def places(self, table: Tensor, position: Tensor, heads: int) -> Tensor:
        """Return where rows' choices lie at ``position`` [R], int64 [H, R]."""
        page = (position.clamp(min=0) // PAGE)[:, None].long()
        block = table.gather(1, page)[:, 0].long()
        return block * heads + torch.arange(heads)[:, None]
