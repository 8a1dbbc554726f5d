"""Layers of paged keys and values for tests, and what their operators must do."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch

from graphopt.ops.pages import LOGICAL, PAGE

CODES = {"": None, "int8": torch.int8, "int4": torch.uint8}


@dataclass
class Layer:
    """One layer's pages, filled through ``append``; ``keys``/``values`` what they saw.

    Pages lie in random order, so that only the table says where.
    """

    batch: int = 2
    heads: int = 3
    dim: int = 32
    value_dim: int = 16
    pages: int = 9
    kind: str = ""
    rings: tuple[int, ...] = ()
    sink_pages: int = 1
    ring_pages: int = 2
    dtype: torch.dtype = torch.float32
    extremes: bool = True
    past: torch.Tensor = field(init=False)

    def __post_init__(self):
        torch.manual_seed(0)
        total = self.batch * self.pages
        table = torch.randperm(total).int().view(self.batch, self.pages)
        full = self.heads - len(self.rings)
        self.full = (*self._pool(full, total), table)
        self.ring = (None,) * 5
        if self.rings:
            self.ring = (*self._ring_pool(), self._ring_table())
        shape = (full, total, PAGE // LOGICAL, 2, self.dim)
        self.statistics = torch.full(shape, float("nan"), dtype=self.dtype)
        self.selected = torch.full((self.batch, full, self.pages), -1).int()
        self.selected_at = torch.full((self.batch, full), -1).int()
        self.past = torch.zeros(self.batch, dtype=torch.int32)
        self.new = 0
        self.keys, self.values = [], []

    def _pool(self, heads, pages):
        dtype = CODES[self.kind] or self.dtype
        part = 2 if self.kind == "int4" else 1

        def pool(width):
            made = torch.empty(heads, pages, PAGE, width // part, dtype=dtype)
            return made.fill_(float("nan") if not self.kind else 7)

        scales = [None, None]
        if self.kind:
            nan = torch.full((heads, pages, PAGE, 2), float("nan"))
            scales = [nan.half(), nan.half()]
        return pool(self.dim), pool(self.value_dim), *scales

    def _ring_pool(self):
        room = self.batch * (self.sink_pages + self.ring_pages) + 1
        return self._pool(len(self.rings), room)

    def _ring_table(self):
        stretch = torch.arange(self.pages)
        turned = (stretch - self.sink_pages) % self.ring_pages + self.sink_pages
        place = torch.where(stretch < self.sink_pages, stretch, turned)
        room = self.sink_pages + self.ring_pages
        return (torch.arange(self.batch)[:, None] * room + place).int()

    @property
    def full_heads(self):
        return [h for h in range(self.heads) if h not in self.rings]

    @property
    def total(self):
        return self.past + self.new

    def append(self, new, op, seed=0):
        """Append ``new`` random tokens to every row through the operator ``op``."""
        generator = torch.Generator().manual_seed(seed)
        self.past, self.new = self.total, new
        shape = (self.batch, self.heads, new)
        key = torch.randn(*shape, self.dim, generator=generator).to(self.dtype)
        value = torch.randn(*shape, self.value_dim, generator=generator).to(self.dtype)
        self.keys.append(key)
        self.values.append(value)
        full, rings = self.full_heads, list(self.rings)
        *pool, table = self.full
        judged = (self.statistics, 0, 0, self.extremes)
        op(key[:, full], value[:, full], self.past, table, *pool, *judged)
        if rings:
            *pool, table = self.ring
            keep = (self.sink_pages, self.ring_pages)
            some = (key[:, rings], value[:, rings])
            op(*some, self.past, table, *pool, None, *keep)

    def held(self):
        """Return the arguments of `graphopt.ops.pages.Held`."""
        keep = (list(self.rings), self.sink_pages, self.ring_pages)
        return *self.full, *self.ring, *keep, self.past, self.new

    def state(self):
        return self.statistics, self.selected, self.selected_at

    def all_keys(self):
        """Return keys and values [B, H, S, D] of rows that all began empty."""
        return torch.cat(self.keys, 2), torch.cat(self.values, 2)
