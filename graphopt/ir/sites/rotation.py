"""Rotary embedding of one tensor, in the forms that models spell it.

- rotate_half: ``x * cos + cat([-x2, x1]) * sin``, x1 and x2 the halves of x;
- interleaved: the same with ``stack([-x2, x1], -1)`` of every other channel;
- by parts: ``cat([x1 * cos - x2 * sin, x2 * cos + x1 * sin])``, or stacked.

Partial rotary joins the rotated channels with those passed on by a `cat`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from graphopt.ir.casts import skip_casts
from graphopt.ir.match import float_of, op_name
from graphopt.ir.sites.channels import (
    JOINS,
    Half,
    are_halves,
    half_of,
    joined,
    sliced_channels,
)
from graphopt.ir.stream.trunk import width


@dataclass(frozen=True)
class Rotation:
    """``output`` is ``input`` rotated, [B, H, S, D] both, or [B, S, H, D].

    ``cos`` and ``sin`` are the operands as multiplied, ``rotary_dim`` the channels
    rotated (D, or fewer where rotary is partial). ``form`` says which channels of the
    input make a pair: half (i and i + rotary_dim / 2) or interleaved (2i and 2i + 1).
    """

    input: fx.Node
    output: fx.Node
    cos: fx.Node
    sin: fx.Node
    form: str
    rotary_dim: int


def find_rotations(graph: fx.Graph) -> dict[fx.Node, Rotation]:
    """Return the rotations of ``graph`` by their output."""
    found: dict[fx.Node, Rotation] = {}
    for node in graph.nodes:
        name = op_name(node)
        rotation = None
        if name == "add":
            rotation = _whole(node)
        elif name in JOINS:
            rotation = _by_parts(node) or _partial(node, found)
        if rotation is not None:
            found[node] = rotation
    return found


def _whole(node: fx.Node) -> Rotation | None:
    """Match x * cos + turned(x) * sin."""
    for first, second in _orders(node):
        for turned, sin in _orders(first, "mul"):
            low = _turned(turned)
            for source, cos in _orders(second, "mul") if low else ():
                if low and skip_casts(source) is low.source:
                    return _rotation(low, node, cos, sin)
    return None


def _turned(node: fx.Node) -> Half | None:
    """Match the halves -x2 and x1 put together; return x1."""
    parts = joined(skip_casts(node))
    if parts is None:
        return None
    second = _negated(skip_casts(parts[0]))
    low, high = half_of(parts[1]), half_of(second) if second else None
    return low if are_halves(low, high) and low and low.form == parts[2] else None


def _by_parts(node: fx.Node) -> Rotation | None:
    """Match x1 * cos - x2 * sin and x2 * cos + x1 * sin put together."""
    parts = joined(node)
    if parts is None:
        return None
    first, second = skip_casts(parts[0]), skip_casts(parts[1])
    if op_name(first) != "sub" or op_name(second) != "add":
        return None
    for x1, cos in _orders(first.args[0], "mul"):
        for x2, sin in _orders(first.args[1], "mul"):
            low = half_of(x1)
            if low and are_halves(low, half_of(x2)):
                products = ({x2, cos}, {x1, sin})
                if _is_sum(second, products):
                    return _rotation(low, node, cos, sin)
    return None


def _is_sum(node: fx.Node, products: tuple[set[fx.Node], set[fx.Node]]) -> bool:
    """Tell whether ``node`` is the sum of the two products."""
    terms = [skip_casts(a) for a in node.args[:2] if isinstance(a, fx.Node)]
    if len(terms) < 2 or any(op_name(term) != "mul" for term in terms):
        return False
    factors = [set(term.all_input_nodes) for term in terms]
    return factors in ([*products], [*products[::-1]])


def _partial(node: fx.Node, found: dict[fx.Node, Rotation]) -> Rotation | None:
    """Match a cat of rotated channels and of the other channels of one tensor."""
    parts = joined(node)
    if parts is None or parts[2] != "half":
        return None
    for turned, passed in (parts[:2], parts[1::-1]):
        rotation = found.get(skip_casts(turned))
        source = sliced_channels(rotation.input) if rotation else None
        same = source is not None and sliced_channels(passed) is source
        if rotation and source and same and width(source) == width(node):
            return replace(rotation, input=source, output=node)
    return None


def _rotation(low: Half, output: fx.Node, cos: fx.Node, sin: fx.Node) -> Rotation:
    dim = width(low.source) or 0
    return Rotation(low.source, output, cos, sin, low.form, dim)


def _negated(node: fx.Node) -> fx.Node | None:
    source = node.args[0] if node.args else None
    negative = op_name(node) == "neg"
    if op_name(node) == "mul" and len(node.args) > 1:
        negative = float_of(node.args[1]) == -1.0
    return source if negative and isinstance(source, fx.Node) else None


def _orders(value: Any, name: str = "add") -> tuple[tuple[fx.Node, fx.Node], ...]:
    """Return the operands of a sum or product of tensors, in both orders."""
    node = skip_casts(value) if isinstance(value, fx.Node) else None
    if node is None or op_name(node) != name or len(node.args) < 2:
        return ()
    left, right = node.args[:2]
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return ()
    return (left, right), (right, left)
