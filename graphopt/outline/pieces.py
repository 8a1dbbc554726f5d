"""Turn a range of operators into a graph of its own, and tell which are alike."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._prims_common import make_contiguous_strides_for

from graphopt.outline.segments import target_name, type_of
from graphopt.outline.sizes import canonical, described, fixed_size, needed


@dataclass(frozen=True)
class Piece:
    """A part of the graph as a module, with the outer values that it reads and gives.

    Two pieces with the same ``key`` run the same code on other tensors: same operators,
    literals and wiring, same types, strides and symbolic sizes of every input, but for
    the names of the sizes: ``symbols`` of one piece stand where those of the other do.
    """

    module: fx.GraphModule
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    key: str
    symbols: tuple[str, ...]


def extract(
    owner: fx.GraphModule, nodes: Sequence[fx.Node], symbols: Sequence[fx.Node]
) -> Piece:
    """Copy ``nodes`` into a graph, with those of ``symbols`` (size inputs) it needs."""
    inside = set(nodes)
    found = dict.fromkeys(_outer_reads(nodes, inside))
    reads = [node for node in found if fixed_size(node) is None]
    sizes = needed(reads, nodes, symbols)
    inputs = list(dict.fromkeys([*sizes, *reads]))
    outputs = [n for n in nodes if any(user not in inside for user in n.users)]
    graph = fx.Graph()
    mapping: dict[fx.Node, Any] = {n: fixed_size(n) for n in found if n not in reads}
    for i, node in enumerate(inputs):
        mapping[node] = graph.placeholder(_placeholder_name(i, node))
        mapping[node].meta = dict(node.meta)
    for node in nodes:
        mapping[node] = graph.node_copy(node, lambda n: mapping[n])
    graph.output(tuple(_as_promised(graph, mapping[n]) for n in outputs))
    module = fx.GraphModule(owner, graph)
    module.meta = dict(owner.meta)
    key, names = _key(nodes, inputs, outputs, sizes)
    return Piece(module, tuple(inputs), tuple(outputs), key, names)


def _as_promised(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """Return what the next piece is compiled for: contiguous where Dynamo saw that.

    Inductor's decompositions may lay an operator's result out otherwise than eager
    does: a cat with an empty tensor keeps the other one's strides. Inside one graph
    that is seen; a piece's reader only knows what Dynamo traced.
    """
    value = node.meta.get("example_value")
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided:
        return node
    contiguous = make_contiguous_strides_for(value.shape)
    if node.op == "placeholder" or str(contiguous) != str(tuple(value.stride())):
        return node
    copied = graph.call_method("contiguous", (node,))
    copied.meta = dict(node.meta)
    return copied


def _placeholder_name(index: int, node: fx.Node) -> str:
    return node.name if node.op == "placeholder" else f"in{index}_{node.name}"


def _outer_reads(nodes: Sequence[fx.Node], inside: set[fx.Node]) -> list[fx.Node]:
    reads = (source for node in nodes for source in node.all_input_nodes)
    return [source for source in reads if source not in inside]


def _key(
    nodes: Sequence[fx.Node],
    inputs: Sequence[fx.Node],
    outputs: Sequence[fx.Node],
    sizes: Sequence[fx.Node],
) -> tuple[str, tuple[str, ...]]:
    number = {node: i for i, node in enumerate([*inputs, *nodes])}

    def literal(value: object) -> object:
        if isinstance(value, fx.Node) and value not in number:
            return repr(fixed_size(value))
        if isinstance(value, fx.Node):
            return f"%{number[value]}"
        if isinstance(value, (tuple, list)):
            return [literal(v) for v in value]
        if isinstance(value, dict):
            return {k: literal(v) for k, v in value.items()}
        if isinstance(value, slice):
            return ["slice", *map(literal, (value.start, value.stop, value.step))]
        return repr(value)

    lines = [
        (
            node.op,
            target_name(node),
            literal(node.args),
            literal(dict(node.kwargs)),
            type_of(node.meta.get("example_value")),
        )
        for node in nodes
    ]
    kinds = [_input_type(node) for node in inputs]
    aliases = _aliases(inputs)
    results = [number[node] for node in outputs]
    text = repr((kinds, aliases, lines, results, described(sizes)))
    text, names = canonical(text)
    return hashlib.sha256(text.encode()).hexdigest(), names


def _input_type(node: fx.Node) -> object:
    value = node.meta.get("example_value")
    is_parameter = isinstance(value, torch.nn.Parameter)
    static = str(node.meta.get("tensor_dict", {}).get("_dynamo_static_input_type"))
    return (type_of(value), is_parameter, static, node.op == "get_attr")


def _aliases(inputs: Sequence[fx.Node]) -> list[int]:
    """Return for each input the first input that shares its storage.

    AOTAutograd treats inputs that alias one another differently, so a layer whose
    inputs alias is not the same as one whose inputs do not.
    """
    first: dict[object, int] = {}
    result = []
    for i, node in enumerate(inputs):
        value = node.meta.get("example_value")
        key: object = i
        if isinstance(value, torch.Tensor) and value.layout == torch.strided:
            key = value.untyped_storage()._cdata
        result.append(first.setdefault(key, i))
    return result
