"""Ragged batches over pages for tests: rows, their pools, and plain attention."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from graphopt.ops.pages import PAGE, append_ragged_reference, pages_of
from graphopt.ops.pages.layout import decode
from tests.ops.pages import CODES
from tests.oracle import oracle, visible


@dataclass(frozen=True)
class Ragged:
    """Rows with ``lengths`` new tokens behind ``past`` ones; ``padding`` is of no row.

    Pages lie in random order, and what no token was written to is NaN. ``shared``: full
    pages that every row begins with.
    """

    lengths: tuple[int, ...] = (5, 0, 1, 130)
    past: tuple[int, ...] = (0, 3, 200, 70)
    padding: int = 3
    heads: int = 4
    kv_heads: int = 2
    dim: int = 32
    value_dim: int = 16
    kind: str = ""
    dtype: torch.dtype = torch.float32
    shared: int = 0
    seed: int = 0

    @property
    def tokens(self):
        return sum(self.lengths) + self.padding

    @property
    def starts(self):
        return torch.tensor([0, *self.lengths]).cumsum(0).int()

    @property
    def before(self):
        return torch.tensor(self.past).int()

    @property
    def table(self):
        generator = torch.Generator().manual_seed(self.seed)
        totals = [n + p for n, p in zip(self.lengths, self.past, strict=True)]
        rows, width = len(totals), max(map(pages_of, totals), default=0) + 1
        order = torch.randperm(rows * width, generator=generator).int()
        table = order.view(rows, width)
        table[:, : self.shared] = table[:1, : self.shared]
        return table

    def empty_pools(self):
        part, rows = (2 if self.kind == "int4" else 1), len(self.lengths)
        dtype = CODES[self.kind] or self.dtype
        fill = 7 if self.kind else float("nan")
        shape = (self.kv_heads, rows * self.table.shape[1], PAGE)
        pools = [
            torch.full((*shape, width // part), fill, dtype=dtype)
            for width in (self.dim, self.value_dim)
        ]
        nan = torch.full((*shape, 2), float("nan"), dtype=torch.float16)
        return *pools, *((nan, nan.clone()) if self.kind else (None, None))

    def random(self, heads, count, width, seed):
        generator = torch.Generator().manual_seed(self.seed + seed)
        x = torch.randn(1, heads, count, width, generator=generator)
        return x.to(self.dtype)

    def query(self):
        return self.random(self.heads, self.tokens, self.dim, 1)

    def new(self):
        """Return the new keys and values, [1, Hkv, N, D]."""
        widths = zip((2, 3), (self.dim, self.value_dim), strict=True)
        return [self.random(self.kv_heads, self.tokens, w, s) for s, w in widths]

    def held_before(self):
        """Return pools with what each row holds already, and nothing else."""
        pools = self.empty_pools()
        for row, past in enumerate(self.past):
            first = self.shared * PAGE if row else 0  # written once
            ends = torch.tensor([0, past - first]).int()
            seeds = zip((10, 20), (self.dim, self.value_dim), strict=True)
            rest = [
                self.random(self.kv_heads, past - first, w, s + row) for s, w in seeds
            ]
            where = (ends, torch.tensor([first]).int(), self.table[row : row + 1])
            append_ragged_reference(*rest, *where, *pools)
        return pools

    def keys_of(self, row, pools):
        """Return all keys and values of a row, [1, Hkv, S, D], as pages hold them."""
        total = self.past[row] + self.lengths[row]
        place = torch.arange(total)
        page, slot = self.table[row, place // PAGE].long(), place % PAGE
        keys, values, *scales = pools
        return [
            decode(
                pool[:, page, slot],
                None if scale is None else scale[:, page, slot],
                torch.float64,
            )[None]
            for pool, scale in zip((keys, values), scales, strict=True)
        ]

    def expected(self, query, pools, pattern, sink, window, scale=None, softcap=0.0):
        """Attention in float64, row by row, over the keys that ``pools`` hold."""
        out = torch.zeros(1, self.heads, self.tokens, self.value_dim).double()
        starts = self.starts.tolist()
        scale = self.dim**-0.5 if scale is None else scale
        for row, (past, length) in enumerate(zip(self.past, self.lengths, strict=True)):
            own = slice(starts[row], starts[row + 1])
            tables = [list(t) * (self.heads // len(t)) for t in (sink, window)]
            mask = torch.stack(
                [
                    visible(pattern, *pair, length, past + length, past)
                    for pair in zip(*tables, strict=True)
                ]
            )
            read = self.keys_of(row, pools)
            out[:, :, own] = oracle(query[:, :, own], *read, mask, scale, softcap)
        return out
