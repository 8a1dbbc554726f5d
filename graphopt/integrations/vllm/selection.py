"""`page-selection` over vLLM's cache: decoded tokens read the pages that matter."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.integrations.vllm.bounds import Bounds, Parts
from graphopt.integrations.vllm.heads import Plan
from graphopt.integrations.vllm.paged import Which, attend, blocks
from graphopt.ops.pages import PAGE
from graphopt.passes.attention.page_selection import PageSelection


@dataclass
class Selection:
    """One layer's: ``item``, and the local KV heads that see ``ring`` only."""

    item: PageSelection
    rings: list[int]
    bounds: Bounds | None = None

    @property
    def ring(self) -> Plan:
        """Return what streaming heads see: whole pages, as `graphopt.Cache` keeps."""
        window = self.item.local // PAGE * PAGE + PAGE
        return Plan("streaming", ((self.item.sink, window),))

    def write(self, cache: Tensor, parts: Parts, reading: Which) -> None:
        """Judge the keys that a step has written; rows that read prompts forget."""
        if self.bounds is None or not self.bounds.fits(cache):
            extremes = self.item.statistics == "extremes"
            self.bounds = Bounds.beside(cache, self.item.budget // PAGE, extremes)
        self.bounds.judge(cache, parts)
        if len(reading[1]):
            self.bounds.forget(reading, cache.shape[1])

    def attend(
        self,
        output: Tensor,
        query: Tensor,
        cache: Tensor,
        which: Which,
        scale: float,
        softcap: float,
    ) -> None:
        """Write attention of query [N, Hq, D] to ``output``, one token a row."""
        if not len(which[1]):
            return
        if self.rings:
            how = (self.ring, scale, softcap, self.rings)
            attend(output, query, cache, which, *how)
        chosen = [h for h in range(cache.shape[1]) if h not in self.rings]
        if chosen:
            self._attend(output, query, cache, which, chosen, scale, softcap)

    def _attend(
        self,
        output: Tensor,
        query: Tensor,
        cache: Tensor,
        which: Which,
        chosen: list[int],
        scale: float,
        softcap: float,
    ) -> None:
        """Attend with the KV heads ``chosen``: rows are (head, request)."""
        assert self.bounds is not None
        (starts, past, table), heads = which, cache.shape[1]
        rows, channels = len(past), query.shape[-1]
        group = query.shape[1] // heads
        first, last = int(starts[0]), int(starts[0]) + rows
        asked, out = (
            x[first:last].view(rows, heads, group, channels) for x in (query, output)
        )
        lines = torch.tensor(chosen, dtype=torch.int32)[:, None, None]
        pages = (table[None] * (2 * heads) + 2 * lines).flatten(0, 1)
        pool = blocks(cache).view(1, -1, PAGE, channels)
        state = _Choice.of(self.bounds, table, past, chosen, heads)
        found = torch.ops.graphopt.page_attention(
            asked[:, chosen].transpose(0, 1).reshape(-1, group, 1, channels),
            *(pool, pool[:, 1:], None, None, pages),
            *(None, None, None, None, None, [], 0, 0),
            *(past.repeat(len(chosen)), 1),
            *(self.bounds.statistics, state.selected, state.at, None),
            *(self.item.budget // PAGE, self.item.interval, scale, softcap),
        )
        state.keep(self.bounds)
        by_head = found.view(len(chosen), rows, group, channels)
        out[:, chosen] = by_head.transpose(0, 1)


@dataclass(frozen=True)
class _Choice:
    """The last choice of rows as the kernel takes it, and ``to`` where it goes.

    ``selected`` int32 [rows, 1, M], ``at`` int32 [rows, 1], ``to`` int64 [rows].
    """

    selected: Tensor
    at: Tensor
    to: Tensor

    @staticmethod
    def of(
        bounds: Bounds, table: Tensor, past: Tensor, chosen: list[int], heads: int
    ) -> _Choice:
        """Read what was chosen for the token before; ``past`` [R] tokens."""
        lies, to = (
            bounds.places(table, at, heads)[chosen].flatten() for at in (past - 1, past)
        )
        room = table.shape[1] - bounds.selected.shape[1]
        kept = torch.nn.functional.pad(bounds.selected[lies], (0, room), value=-1)
        return _Choice(kept[:, None].contiguous(), bounds.selected_at[lies, None], to)

    def keep(self, bounds: Bounds) -> None:
        """Write what is chosen now."""
        room = bounds.selected.shape[1] - self.selected.shape[2]
        chosen = torch.nn.functional.pad(self.selected[:, 0], (0, room), value=-1)
        bounds.selected[self.to] = chosen
        bounds.selected_at[self.to] = self.at[:, 0]
