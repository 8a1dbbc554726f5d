"""One launch for all heads of a layer: which kernel, with which tables."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeVar

from torch import fx

from graphopt import cost
from graphopt.codegen.predicates import BLOCK
from graphopt.ir.attention.site import AttentionSite
from graphopt.ir.replace import BlockTables, replace_by_visit, replace_site
from graphopt.ir.shards import RankShare
from graphopt.passes.attention.heads import UNBOUNDED, HeadPattern, VisitRow

_Row = TypeVar("_Row")


@dataclass(frozen=True)
class StaticPlan:
    """The kernel of a predicate, exact to the token.

    ``pairs`` holds (sink, window) for all heads, or for each.
    """

    pattern: str
    pairs: tuple[tuple[int, int], ...]

    def narrowest(self) -> int:
        """Return the window of the narrowest head, in tokens."""
        return min(window for _, window in self.pairs)

    def pays_from(self, device: str) -> int:
        """Return the length from which some head is predicted faster than dense."""
        covered = min(sink + window for sink, window in self.pairs) + 1
        pays = (cost.pays_from(self.pattern, *p, device) for p in set(self.pairs))
        return max(min(pays), covered)

    def rewrite(self, gm: fx.GraphModule, site: AttentionSite, pays: int) -> None:
        """Replace ``site``; below ``pays`` tokens it runs dense."""
        sink, window = ([p[i] for p in self.pairs] for i in range(2))
        replace_site(
            gm, site, pattern=self.pattern, sink=sink, window=window, min_tokens=pays
        )

    def part(self, share: RankShare) -> StaticPlan:
        """Return the same kernel with the tables of a rank's heads."""
        return replace(self, pairs=_part(self.pairs, share))

    def describe(self) -> str:
        """Return what the remark says."""
        sink, window = (min(p[i] for p in self.pairs) for i in range(2))
        text = f"{self.pattern}, sink {sink}, window {window}"
        return text + _kinds(len(set(self.pairs)))


@dataclass(frozen=True)
class VisitPlan:
    """The kernel over visit lists, rounded up to blocks of 64 rows.

    ``rows`` holds one row for all heads, or one for each.
    """

    rows: tuple[VisitRow, ...]

    def narrowest(self) -> int:
        """Return the length up to which every head sees everything, in tokens."""
        return min(row.exact_to() for row in self.rows)

    def pays_from(self, device: str) -> int:
        """Return the length from which some head is predicted faster than dense."""
        covered = min(row.covered() for row in self.rows) + 1
        pays = (
            cost.visit_pays_from(
                r.sink,
                r.window,
                r.vertical,
                r.slash,
                device,
                r.blocks,
                r.stride,
                r.threshold,
            )
            for r in set(self.rows)
        )
        return max(min(pays), covered)

    def rewrite(self, gm: fx.GraphModule, site: AttentionSite, pays: int) -> None:
        """Replace ``site``; below ``pays`` tokens it runs dense."""
        replace_by_visit(
            gm,
            site,
            sink=[row.sink for row in self.rows],
            window=[row.window for row in self.rows],
            vertical=[row.vertical for row in self.rows],
            slash=[row.slash for row in self.rows],
            dense_rows=[row.last for row in self.rows],
            blocks=self._block_tables(),
            min_tokens=pays,
        )

    def part(self, share: RankShare) -> VisitPlan:
        """Return the same kernel with the tables of a rank's heads."""
        return replace(self, rows=_part(self.rows, share))

    def _block_tables(self) -> BlockTables | None:
        if not any(row.has_list for row in self.rows):
            return None
        return BlockTables(
            [row.blocks for row in self.rows],
            [row.stride for row in self.rows],
            [row.threshold for row in self.rows],
        )

    def describe(self) -> str:
        """Return what the remark says."""
        parts = ["visit lists"]
        lines = [row for row in self.rows if not row.has_list]
        if lines:
            row = max(lines, key=lambda r: (r.slash, r.vertical))
            parts.append(f"sink {row.sink}, window {row.window}")
            if row.vertical or row.slash:
                parts.append(f"{row.vertical} columns and {row.slash} slashes chosen")
        parts += sorted({_describe_list(row) for row in self.rows if row.has_list})
        return ", ".join(parts) + _kinds(len(set(self.rows)))


def _describe_list(row: VisitRow) -> str:
    if row.stride:
        return f"blocks of {row.threshold:g} of the mass by stride {row.stride}"
    return f"best {row.blocks} blocks"


def _kinds(count: int) -> str:
    return f" ({count} kinds of heads)" if count > 1 else ""


def layer_plan(heads: Sequence[HeadPattern]) -> StaticPlan | VisitPlan | None:
    """Join the heads of a layer into one launch, or None when all heads are dense.

    Heads of one predicate share its kernel; any other mix goes through visit lists.
    """
    names = {h.pattern for h in heads if h.pattern != "dense"}
    if not names:
        return None
    streaming = "streaming" in names
    if not all(h.is_static for h in heads) or (streaming and len(names) > 1):
        return VisitPlan(_shared([h.row() for h in heads]))
    pairs = [h.sizes() for h in heads]
    if streaming:
        wide = UNBOUNDED // BLOCK * BLOCK
        pairs = [(sink, min(window, wide)) for sink, window in pairs]
    pattern = "streaming" if streaming else "a-shape"
    if not streaming and all(sink == 0 for sink, _ in pairs):
        pattern = "sliding-window"
    return StaticPlan(pattern, _shared(pairs))


def _part(rows: tuple[_Row, ...], share: RankShare) -> tuple[_Row, ...]:
    return rows if len(rows) == 1 else _shared(share.part(rows))


def _shared(rows: Sequence[_Row]) -> tuple[_Row, ...]:
    """A table of equal rows is one row."""
    return tuple(rows[:1] if len(set(rows)) == 1 else rows)
