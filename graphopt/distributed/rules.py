"""The common operators on DTensors, each as what a rank does in the model's spelling.

A rule returns the node that takes an operator's place, None where the tensors are
spread otherwise than it knows.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch.distributed.tensor import Partial, Replicate, Shard

from graphopt import _compat
from graphopt.ir.match import argument, value_of
from graphopt.ir.replace import call

if TYPE_CHECKING:
    from graphopt.distributed.lowering import Lowering

_functional = torch.ops._c10d_functional
_Rule = Callable[["Lowering", fx.Node], "fx.Node | None"]


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


RULES: dict[str, _Rule] = {
    "to_local": _to_local,
    "from_local": _from_local,
    "redistribute": _redistribute,
    "linear": _linear,
    "embedding": _embedding,
}
