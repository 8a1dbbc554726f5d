"""What a method has to beat at its own density: random columns, and a window."""

from __future__ import annotations

import math

import torch
from torch import Tensor, fx, nn

from graphopt.codegen.predicates import BLOCK
from graphopt.ops import VisitList
from graphopt.search.density import causal_pairs
from graphopt.search.runner import Edit
from graphopt.search.sites import causal_sites, replace_by_lists


class RandomColumns(nn.Module):
    """Visit lists of a row's own block of 64 and of random columns, other ones a head.

    There are as many columns as make ``density`` of the pairs at the prompt's length.
    """

    def __init__(self, density: float, seed: int) -> None:
        super().__init__()
        self.density, self.seed = density, seed

    def forward(self, query: Tensor, key: Tensor) -> VisitList:
        """Draw columns without replacement, other ones for every head."""
        batch, heads, tokens = query.shape[:3]
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.rand(batch, heads, tokens, generator=generator).argsort(-1)
        count = columns_for(self.density, tokens)
        columns = order[..., : max(count, 1)].sort(-1).values.int().contiguous()
        runs = torch.tensor([1 - BLOCK, 1], dtype=torch.int32)
        full = torch.full((batch, heads), count, dtype=torch.int32)
        return VisitList(
            runs.expand(batch, heads, 1, 2).contiguous(),
            torch.ones(batch, heads, dtype=torch.int32),
            columns,
            full,
        )


def random_columns(density: float, seed: int = 0) -> Edit:
    """Return the edit that visits ``density`` of the causal pairs at random."""

    def edit(gm: fx.GraphModule) -> None:
        for site in causal_sites(gm):
            columns = RandomColumns(density, 1000 * seed + site.index)
            replace_by_lists(gm, site, columns)

    return edit


def columns_for(density: float, tokens: int) -> int:
    """Return how many random columns, beside each row's block, make ``density``.

    A random column outside the block is seen by all later blocks, on average by
    ``1 / tokens`` of the pairs that are not the block's own.
    """
    own = sum(min(r % BLOCK + 1, r + 1) for r in range(tokens)) / causal_pairs(tokens)
    return max(0, min(tokens, round((density - own) / (1 - own) * tokens)))


def window_for(density: float, tokens: int) -> int:
    """Return the sliding window that visits ``density`` of the causal pairs.

    Rows before the window see all of their past: pairs(w) = w n - w (w - 1) / 2.
    """
    half = tokens + 0.5
    root = math.sqrt(max(half * half - 2 * density * causal_pairs(tokens), 0.0))
    return max(1, min(tokens, round(half - root)))
