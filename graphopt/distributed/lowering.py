"""Each operator on DTensors as what this rank does: local operators and collectives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard

from graphopt import _compat
from graphopt.errors import PassError
from graphopt.ir.constants import is_parameter
from graphopt.ir.match import argument, op_name, value_of
from graphopt.ir.replace import call
from graphopt.ir.sizes.fake_runs import apply

_functional = torch.ops._c10d_functional
_Rule = Callable[["Lowering", fx.Node], "fx.Node | None"]


class Lowering:
    """Rewrites the DTensors of one graph; PassError where it cannot.

    The common operators have rules, which keep their spelling for matchers; any other
    is traced with the DTensors that it takes, down to what they do on this rank.
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm, self.graph = gm, gm.graph
        self.held: dict[fx.Node, DTensor] = {
            node: value
            for node in gm.graph.nodes
            if isinstance(value := value_of(node), DTensor)
        }

    def run(self) -> None:
        """Lower every operator that takes or gives a DTensor, in graph order."""
        output = self.graph.find_nodes(op="output")[0]
        if any(node in self.held for node in output.all_input_nodes):
            raise PassError("the graph returns DTensors")
        todo = [n for n in self.graph.nodes if n.op != "output" and self._touches(n)]
        for node in todo:
            if node.op == "placeholder":
                node.meta["example_value"] = self._part(node)
                continue
            with self.graph.inserting_before(node):
                new = self._lowered(node)
            if node in self.held:
                self.held[new] = self.held[node]
            node.replace_all_uses_with(new)
            self.graph.erase_node(node)

    def _part(self, node: fx.Node) -> torch.Tensor:
        """Return this rank's part of an input; of a parameter it is one."""
        whole = self.held[node]
        part: torch.Tensor = whole._local_tensor
        if not is_parameter(node):
            return part
        return torch.nn.Parameter(part, requires_grad=whole.requires_grad)

    def _touches(self, node: fx.Node) -> bool:
        return node in self.held or any(n in self.held for n in node.all_input_nodes)

    def _lowered(self, node: fx.Node) -> fx.Node:
        rule = _RULES.get(op_name(node))
        found = rule(self, node) if rule is not None else None
        return found if found is not None else self._traced(node)

    def placements(self, node: Any) -> tuple[Any, ...] | None:
        """Return how a value is spread over a mesh of one axis; None of others."""
        if node not in self.held:
            return None
        spec = self.held[node]._spec
        return tuple(spec.placements) if spec.mesh.ndim == 1 else None

    def _traced(self, node: fx.Node) -> fx.Node:
        """Insert the local operators that ``node`` comes down to."""
        from torch.fx.experimental.proxy_tensor import make_fx

        sources = node.all_input_nodes
        mode: Any = _compat.fake_mode_of(self.gm)

        def local(*parts: Any) -> Any:
            values = dict(zip(sources, map(self._whole, sources, parts), strict=True))
            args, kwargs = fx.map_arg((node.args, node.kwargs), values.__getitem__)
            result = apply(node, args, kwargs)
            return result._local_tensor if isinstance(result, DTensor) else result

        examples = [self._example(source) for source in sources]
        with mode, torch.no_grad():
            traced = make_fx(local)(*examples)
        return self._inline(traced, sources)

    def _whole(self, source: fx.Node, part: Any) -> Any:
        """Return what ``node`` takes: the DTensor of this rank's part."""
        if source in self.held:
            return DTensor(part, self.held[source]._spec, requires_grad=False)
        return getattr(value_of(source), "real_obj", part)  # such as a mesh

    def _example(self, source: fx.Node) -> Any:
        if source in self.held:
            return self.held[source]._local_tensor
        return getattr(value_of(source), "real_obj", value_of(source))

    def _inline(self, traced: fx.GraphModule, sources: list[fx.Node]) -> fx.Node:
        mapping: dict[fx.Node, fx.Node] = dict(
            zip(traced.graph.find_nodes(op="placeholder"), sources, strict=True)
        )
        for node in traced.graph.nodes:
            if node.op == "output":
                result: Any = node.args[0]
                return mapping[result]
            if node.op == "get_attr":
                raise PassError(f"{node.name} is a constant tensor")
            if node.op != "placeholder":
                mapping[node] = self.graph.node_copy(node, lambda n: mapping[n])
                mapping[node].meta = {"example_value": node.meta.get("val")}
        raise AssertionError("a graph has an output")


def _to_local(lowering: Lowering, node: fx.Node) -> fx.Node | None:
    found: Any = argument(node, 0, "self")
    return found


def _from_local(lowering: Lowering, node: fx.Node) -> fx.Node | None:
    found: Any = argument(node, 0, "local_tensor")
    return found


def _redistribute(lowering: Lowering, node: fx.Node) -> fx.Node | None:
    source: Any = argument(node, 0, "self")
    before, after = lowering.placements(source), lowering.placements(node)
    if before is None or after is None:
        return None
    if before == after:
        found: fx.Node = source
        return found
    if isinstance(before[0], Partial) and after == (Replicate(),):
        if before[0].reduce_op != "sum":
            return None
        group = lowering.held[source]._spec.mesh.get_group().group_name
        graph = lowering.graph
        summed = call(graph, _functional.all_reduce.default, (source, "sum", group))
        return call(graph, _functional.wait_tensor.default, (summed,))
    return None


def _linear(lowering: Lowering, node: fx.Node) -> fx.Node | None:
    """A linear whose outputs or whose inputs are sharded is a smaller linear."""
    source, weight = argument(node, 0, "input"), argument(node, 1, "weight")
    bias = argument(node, 2, "bias")
    given, held, result = (lowering.placements(x) for x in (source, weight, node))
    of_bias = None if bias is None else lowering.placements(bias)
    by_input = (Shard(value_of(source).ndim - 1),)
    if (given, held, result) == ((Replicate(),), (Shard(0),), by_input):
        if bias is not None and of_bias != held:
            return None
    elif (given, held) == (by_input, (Shard(1),)) and _is_partial(result):
        if bias is not None and of_bias != (Replicate(),):
            return None
        if bias is not None:  # each rank adds its share to its part of the sum
            ranks = lowering.held[weight]._spec.mesh.size()
            bias = call(lowering.graph, torch.ops.aten.div.Scalar, (bias, ranks))
    else:
        return None
    return call(lowering.graph, torch._C._nn.linear, (source, weight, bias))


def _is_partial(spread: tuple[Any, ...] | None) -> bool:
    return spread is not None and isinstance(spread[0], Partial)


def _embedding(lowering: Lowering, node: fx.Node) -> fx.Node | None:
    """Of a vocabulary that is shared out a rank looks up its own ids, zeros for others.

    torch's own way keeps the mask on an object that outlives the graph.
    """
    ids, weight = argument(node, 0, "input"), argument(node, 1, "weight")
    spread = [lowering.placements(x) for x in (weight, ids)]
    limited = argument(node, 3, "max_norm") is not None
    if spread != [(Shard(0),), (Replicate(),)] or limited:
        return None
    spec = lowering.held[weight]._spec
    count = int(value_of(weight).shape[0])
    start = _compat.shard_offset(spec)
    graph, aten = lowering.graph, torch.ops.aten
    moved = call(graph, aten.sub.Scalar, (ids, start))
    below = call(graph, aten.lt.Scalar, (moved, 0))
    above = call(graph, aten.ge.Scalar, (moved, count))
    others = call(graph, aten.logical_or.default, (below, above))
    own = call(graph, aten.masked_fill.Scalar, (moved, others, 0))
    found = call(graph, torch.nn.functional.embedding, (own, weight))
    rows = call(graph, aten.unsqueeze.default, (others, -1))
    return call(graph, aten.masked_fill.Scalar, (found, rows, 0.0))


_RULES: dict[str, _Rule] = {
    "to_local": _to_local,
    "from_local": _from_local,
    "redistribute": _redistribute,
    "linear": _linear,
    "embedding": _embedding,
}
