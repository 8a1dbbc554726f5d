"""Cut the body of a chunk loop into op groups: what of a layer runs as one task.

llm.npu (Xu et al. 2025, section 3.4) calls a group static where it works on its own
chunk alone, and dynamic where it reads what the chunks before have left: attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx

from graphopt import ops as _ops  # noqa: F401  registers graphopt::append_rows
from graphopt.errors import PassError
from graphopt.ir.dce import has_effect
from graphopt.ir.match import is_mutating, op_name, value_of
from graphopt.ir.model_graph import ModelGraph

ATTENTION = "attention"


@dataclass(frozen=True)
class OpGroup:
    """The operators ``nodes`` of one layer, in graph order.

    ``name`` is qkv (the norm and linears in front of attention), attention, ffn (output
    projection and FFN) or linears (ffn, and qkv of the next layer, where no residual
    stream between them was found). ``writes`` put the keys and values of the chunk
    behind those of earlier ones; they run when the rest has.
    """

    layer: int
    name: str
    nodes: tuple[fx.Node, ...]
    writes: tuple[fx.Node, ...] = ()

    @property
    def dynamic(self) -> bool:
        """Tell whether it reads keys and values of other chunks."""
        return self.name == ATTENTION


@dataclass
class _Layer:
    """Places of the operators that write and that read a layer's keys and values."""

    writes: list[int] = field(default_factory=list)
    reads: list[int] = field(default_factory=list)


def op_groups(body: fx.GraphModule) -> list[OpGroup]:
    """Return the op groups of ``body`` in order; every operator is in one.

    Raises PassError, with the reason, for a body whose chunks could not be told apart:
    a layer that reads keys of another, or writes to what all chunks are given.
    """
    nodes = [n for n in body.graph.nodes if n.op not in ("placeholder", "output")]
    layers = _layers(body.graph, nodes)
    if not layers:
        raise PassError("no layer writes keys and values of a chunk")
    ends = _ends(body, nodes, layers)
    found: list[OpGroup] = []
    start = 0
    for index, (layer, end) in enumerate(zip(layers, ends, strict=True)):
        first, last = layer.reads[0], layer.reads[-1] + 1
        merged = index > 0 and ends[index - 1] is None
        name, number = ("linears", index - 1) if merged else ("qkv", index)
        found.append(_group(nodes, start, first, name, number))
        found.append(_group(nodes, first, last, ATTENTION, index))
        start = last
        if end is not None and end > last:
            found.append(_group(nodes, last, end, "ffn", index))
            start = end
    return found


def _group(
    nodes: Sequence[fx.Node], start: int, end: int, name: str, layer: int
) -> OpGroup:
    part = nodes[start:end]
    own = tuple(n for n in part if not _appends(n))
    return OpGroup(layer, name, own, tuple(filter(_appends, part)))


def _appends(node: fx.Node) -> bool:
    return node.target is torch.ops.graphopt.append_rows.default


def _layers(graph: fx.Graph, nodes: Sequence[fx.Node]) -> list[_Layer]:
    states = {_storage(n.args[1]) for n in nodes if _appends(n)}
    given = {_storage(n) for n in graph.find_nodes(op="placeholder")} - {None}
    owner: dict[Any, int] = {}
    layers: list[_Layer] = []
    for place, node in enumerate(nodes):
        touched = {_storage(n) for n in node.all_input_nodes}
        if _appends(node):
            if not layers or layers[-1].reads:
                layers.append(_Layer())
            layers[-1].writes.append(place)
            owner[_storage(node.args[1])] = len(layers) - 1
            continue
        if _has_order(node):
            raise PassError(f"{node.name} must run in the order of the chunks")
        if is_mutating(node) and not touched.isdisjoint(given):
            raise PassError(f"{node.name} writes to what every chunk is given")
        for state in touched & states:
            if owner.get(state) != len(layers) - 1:
                raise PassError(f"{node.name} reads keys or values of another layer")
            layers[-1].reads.append(place)
    if any(not layer.reads for layer in layers):
        raise PassError("the keys and values of a layer are not read")
    return layers


def _has_order(node: fx.Node) -> bool:
    """Random numbers and modes of torch go from one chunk into the next."""
    harmless = any(part in op_name(node) for part in ("_check", "assert", "item"))
    return has_effect(node) and not is_mutating(node) and not harmless


def _storage(node: Any) -> int | None:
    """Views of a tensor share its fake storage."""
    value = value_of(node)
    return value.untyped_storage()._cdata if isinstance(value, torch.Tensor) else None


def _ends(
    body: fx.GraphModule, nodes: Sequence[fx.Node], layers: Sequence[_Layer]
) -> list[int | None]:
    """Return where each layer ends; None where no single value leaves it."""
    place = {node: i for i, node in enumerate(nodes)}
    found = ModelGraph(body).layers
    ends: list[int | None] = [None] * len(layers)
    if len(found) == len(layers):
        ends = [place.get(layer.output) for layer in found]  # type: ignore[arg-type]
    for index, layer in enumerate(layers[:-1]):
        end, following = ends[index], layers[index + 1].writes[0]
        inside = end is not None and layer.reads[-1] < end < following
        ends[index] = end + 1 if inside and end is not None else None
    ends[-1] = len(nodes)
    return ends
