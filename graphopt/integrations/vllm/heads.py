"""The patterns of the query heads that one rank computes, layer by layer."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

from graphopt.errors import ConfigError
from graphopt.passes.attention.heads import UNBOUNDED, HeadPattern
from graphopt.passes.attention.page_selection import PageSelection
from graphopt.passes.attention.plans import StaticPlan, layer_plan
from graphopt.passes.attention.sparse_attention import SparseAttention


@dataclass(frozen=True)
class LocalHeads:
    """Query heads ``first`` to ``first + count - 1`` of layer ``layer``.

    ``group`` of them share a head of keys.
    """

    layer: int
    first: int
    count: int
    group: int

    def plan(self, item: SparseAttention) -> Plan:
        """Return what ``item`` says of these heads; causal where it says nothing."""
        if item.layers is not None and self.layer not in item.layers:
            return Plan("causal")
        found = layer_plan([self._pattern(item, h) for h in range(self.count)])
        if found is None:
            return Plan("causal")
        if not isinstance(found, StaticPlan):
            raise ConfigError(
                "vLLM: sparse-attention: streaming heads and heads of other windows do "
                f"not go together in one layer ({self.layer}); use one pattern"
            )
        return Plan(found.pattern, found.pairs)

    def rings(self, item: PageSelection) -> list[int]:
        """Return the local KV heads that see a ring only when they decode."""
        streaming = item.streaming()
        if streaming is None:
            return []
        heads = range(self.first // self.group, self._last // self.group + 1)
        return [i for i, head in enumerate(heads) if head in streaming[self.layer]]

    @property
    def _last(self) -> int:
        return self.first + self.count - 1

    def _pattern(self, item: SparseAttention, local: int) -> HeadPattern:
        head = self.first + local
        found, table = item._base(), item.heads_table()
        if table is not None:
            found = table.pattern(self.layer, head, self.group, found)
        for rule in item.heads:
            if rule.covers(self.layer, head):
                found = found.overridden(rule)
        return found


@dataclass(frozen=True)
class Plan:
    """``pattern`` with (sink, window) of all heads or of each, in tokens."""

    pattern: str
    pairs: tuple[tuple[int, int], ...] = ((0, UNBOUNDED),)

    @cached_property
    def sink(self) -> list[int]:
        """Return the first tokens that are seen, of all heads or of each."""
        return [sink for sink, _ in self.pairs]

    @cached_property
    def window(self) -> list[int]:
        """Return the last tokens that are seen, of all heads or of each."""
        return [window for _, window in self.pairs]
