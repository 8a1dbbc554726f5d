"""Which operators of a whole model's graph belong to which stage of a pipeline.

What comes from the residual stream is a stage's own and is computed once, by the stage
in whose part of the graph it stands. All else (rotary tables, positions, masks, the
cache's counters) depends on inputs that every stage is given, so each stage that reads
it computes it for itself: only hidden states travel.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import fx

from graphopt.errors import ModelError
from graphopt.ir.aliases import storage_of
from graphopt.ir.dce import has_effect
from graphopt.ir.match import is_mutating, value_of


class Members:
    """The nodes of each stage of ``graph``.

    ``start`` is the residual stream that the first layer reads, ``ends`` what leaves
    the last layer of every stage but the last one.
    """

    def __init__(
        self, graph: fx.Graph, start: fx.Node, ends: Sequence[fx.Node]
    ) -> None:
        self.graph, self.start = graph, start
        self.order = {node: place for place, node in enumerate(graph.nodes)}
        self._ends = [self.order[end] for end in ends]
        self.stages = len(ends) + 1
        self.own = _descendants(graph, start)
        self._storages = {node: storages(node) for node in graph.nodes}
        self._writes = {node: set(written(node)) for node in graph.nodes}
        self._nodes = [self._of(stage) for stage in range(self.stages)]
        for stage in range(self.stages):
            self._check(stage)

    def owner(self, node: fx.Node) -> int:
        """Return the stage in whose part of the graph a node stands."""
        return bisect_left(self._ends, self.order[node])

    def nodes(self, stage: int) -> list[fx.Node]:
        """Return what a stage computes, in graph order."""
        return sorted(self._nodes[stage], key=self.order.__getitem__)

    def crossing(self, stage: int) -> list[fx.Node]:
        """Return what goes from ``stage`` to the next one, in graph order."""
        return [n for n in self._crossing if self._spans(n, stage)]

    @cached_property
    def _crossing(self) -> list[fx.Node]:
        return [n for n in self.graph.nodes if n in self.own and n.op != "output"]

    def _spans(self, node: fx.Node, stage: int) -> bool:
        readers = (u for u in node.users if u.op != "output")
        return self.owner(node) <= stage and any(self.owner(u) > stage for u in readers)

    def _of(self, stage: int) -> set[fx.Node]:
        found: set[fx.Node] = set()
        mine = [n for n in self.own if n.op != "output" and self.owner(n) == stage]
        results = self.graph.output_node().all_input_nodes
        self._add(found, [*mine, *(n for n in results if n not in self.own)])
        effects = [n for n in self.graph.nodes if self._acts_alone(n)]
        more = effects
        while more:
            reads = self._reads(found)
            left = (node for node in effects if node not in found)
            more = [node for node in left if self._joins(node, stage, reads)]
            self._add(found, more)
        return found

    def _acts_alone(self, node: fx.Node) -> bool:
        given = node.op in ("placeholder", "output") or node in self.own
        return not given and has_effect(node)

    def _joins(self, node: fx.Node, stage: int, reads: set[int]) -> bool:
        """Tell whether a stage that ``reads`` these needs the effect of ``node``."""
        if self.order[node] < self._body or self.owner(node) == stage:
            return True
        return bool(self._writes[node] & reads)

    @cached_property
    def _body(self) -> int:
        """Return where the layers begin: what stands before concerns every stage."""
        places = (self.order[n] for n in self.own if n is not self.start)
        return min(places, default=len(self.order))

    def _reads(self, nodes: Iterable[fx.Node]) -> set[int]:
        inputs = {source for node in nodes for source in node.all_input_nodes}
        return {storage for node in inputs for storage in self._storages[node]}

    def _add(self, found: set[fx.Node], nodes: Iterable[fx.Node]) -> None:
        """Add nodes and what they read, up to inputs and what another stage sends."""
        waiting = list(nodes)
        while waiting:
            node = waiting.pop()
            if node not in found and node.op != "placeholder":
                found.add(node)
                waiting += [n for n in node.all_input_nodes if n not in self.own]

    def _check(self, stage: int) -> None:
        """Raise ModelError where state that one stage writes is read by another."""
        nodes = self._nodes[stage]
        reads = self._reads(nodes)
        for node, storages_written in self._writes.items():
            if node in nodes or not (shared := storages_written & reads):
                continue
            for reader in nodes:
                if self.order[reader] > self.order[node] and shared & self._reads(
                    [reader]
                ):
                    raise ModelError(
                        f"pipelining: stage {stage} reads in {reader.name} what "
                        f"{node.name} of stage {self.owner(node)} writes to the cache; "
                        "leave out the pass that lets layers share state, or use "
                        "fewer stages"
                    )


def _descendants(graph: fx.Graph, start: fx.Node) -> set[fx.Node]:
    found = {start}
    for node in graph.nodes:
        if not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def written(node: fx.Node) -> list[int]:
    """Return the storages that a node writes to."""
    if not is_mutating(node):
        return []
    target: Any = node.target
    if isinstance(target, torch._ops.OpOverloadPacket):
        target = getattr(target, target.overloads()[0])
    if isinstance(target, torch._ops.OpOverload):
        named = zip(target._schema.arguments, node.args, strict=False)
        places = [value for argument, value in named if _is_written(argument)]
        by_name = {a.name: a for a in target._schema.arguments}
        places += [v for k, v in node.kwargs.items() if _is_written(by_name[k])]
    else:
        places = [*node.args[:1], node.kwargs.get("out")]
    nodes: list[fx.Node] = []
    fx.map_arg(places, nodes.append)
    return [storage for found in nodes for storage in storages(found)]


def _is_written(argument: Any) -> bool:
    return argument.alias_info is not None and argument.alias_info.is_write


def storages(node: fx.Node) -> list[int]:
    """Return the storages of the tensors that a node stands for."""
    value = value_of(node)
    values = value if isinstance(value, (tuple, list)) else [value]
    return [known for v in values if (known := storage_of(v)) is not None]
