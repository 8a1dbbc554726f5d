"""Find forwards of one architecture in a graph, and let them share their linears."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from graphopt.ir.logits.insert import insert, sort
from graphopt.ir.match import op_name, sizes_of, value_of
from graphopt.ir.sites.linear import is_linear, operands

Pairs = dict[fx.Node, fx.Node]
"""What a node of one forward is in the other."""


def find_twins(reference: fx.Node, tuned: fx.Node) -> Pairs | str:
    """Walk two heads back to their inputs; return what belongs together, or why not.

    The forwards must compute the same with inputs of the same kind (weights, caches);
    the tuned one may add to what a shared weight gives (a low-rank adapter).
    """
    found: Pairs = {}
    waiting = [(reference, tuned)]
    while waiting:
        one, other = waiting.pop()
        if one is other or found.get(one) is other:
            continue
        other = _without_adapter(one, other)
        if one in found and found[one] is not other:
            return f"{one.name} is both {found[one].name} and {other.name}"
        found[one] = other
        (form, mine), (shape, theirs) = _arguments(one), _arguments(other)
        if reason := _differ(one, other, form == shape):
            return reason
        waiting += zip(mine, theirs, strict=True)
    return found


def _without_adapter(one: fx.Node, other: fx.Node) -> fx.Node:
    """Return the product with the same weight that ``other`` adds something to."""
    if not is_linear(one) or op_name(other) != "add":
        return other
    weight = operands(one)[1]
    for part in other.args:
        linear = isinstance(part, fx.Node) and is_linear(part)
        if linear and operands(part)[1] is weight:  # type: ignore[arg-type]
            return part  # type: ignore[return-value]
    return other


def _arguments(node: fx.Node) -> tuple[Any, list[fx.Node]]:
    """Return the arguments with a word for every node, and the nodes."""
    nodes: list[fx.Node] = []

    def keep(input: fx.Node) -> Any:
        nodes.append(input)
        return "node"

    return fx.map_arg((node.args, node.kwargs), keep), nodes


def _differ(one: fx.Node, other: fx.Node, alike: bool) -> str:
    """Return how two nodes differ beside their inputs; nothing where they do not."""
    if one.op != other.op or op_name(one) != op_name(other):
        return f"{one.name} is {op_name(one)}, {other.name} is {op_name(other)}"
    if one.op in ("placeholder", "get_attr") and _kind(one) != _kind(other):
        return f"inputs {one.name} and {other.name} are of different kinds"
    return "" if alike else f"arguments of {one.name} and {other.name} differ"


def _kind(node: fx.Node) -> tuple[str, int]:
    value = value_of(node)
    return str(getattr(value, "dtype", type(value))), len(sizes_of(node))


def shared_linears(every: Sequence[Pairs]) -> list[list[fx.Node]]:
    """Return groups of linears with one weight: a reference's, and its twins'."""
    groups: dict[fx.Node, list[fx.Node]] = {}
    for pairs in every:
        for one, other in pairs.items():
            if is_linear(one) and operands(one)[1:] == operands(other)[1:]:
                groups.setdefault(one, [one]).append(other)
    order = {node: i for i, node in enumerate(_graph_of(groups))}
    return sorted(groups.values(), key=lambda group: order[group[0]])


def _graph_of(groups: dict[fx.Node, list[fx.Node]]) -> list[fx.Node]:
    return list(next(iter(groups)).graph.nodes) if groups else []


def merge_linears(gm: fx.GraphModule, groups: Sequence[list[fx.Node]]) -> None:
    """Let each group read its weight once: inputs one below another, one product.

    Inputs [B, ..., K] of a group have one shape; no call of ``gm`` writes to an input.
    """
    for group in groups:
        last = group[-1]
        sources = [operands(node)[0] for node in group]
        with gm.graph.inserting_before(last):
            rows = insert(gm.graph, torch.cat, (sources, 0))
            args = tuple(rows if a is sources[-1] else a for a in last.args)
            product = insert(gm.graph, last.target, args, dict(last.kwargs))  # type: ignore[arg-type]
            parts = insert(gm.graph, torch.chunk, (product, len(group), 0))
            pieces = [
                insert(gm.graph, operator.getitem, (parts, i))
                for i in range(len(group))
            ]
        for node, piece in zip(group, pieces, strict=True):
            piece.meta = {**node.meta, **piece.meta}
            node.replace_all_uses_with(piece)
        for node in group:
            gm.graph.erase_node(node)
    sort(gm.graph)
