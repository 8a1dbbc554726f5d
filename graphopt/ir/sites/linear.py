"""Linear sites: products of activations with a parameter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from graphopt.ir.match import argument, op_name, shape_of

_TRANSPOSES = ("getattr", "t", "transpose")


@dataclass(frozen=True)
class LinearSite:
    """``node`` = input [..., K] @ weight [N, K]^T + bias [N].

    ``transposed``: the weight is used as it lies, [K, N] (Conv1D).
    """

    node: fx.Node
    input: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    transposed: bool


def find_linears(gm: fx.GraphModule) -> list[LinearSite]:
    """Return the linears of ``gm`` in graph order."""
    sites = []
    for node in gm.graph.nodes:
        if is_linear(node):
            source, weight, bias = operands(node)
            stored = (op_name(node) in ("addmm", "matmul")) and weight in node.args
            sites.append(LinearSite(node, source, weight, bias, stored))
    return sites


def is_linear(node: fx.Node) -> bool:
    """Tell whether ``node`` multiplies by a parameter.

    Spelt as linear, as addmm (Conv1D) or as a product with a transposed weight.
    """
    name = op_name(node)
    if name == "matmul":
        return _is_weight(node.args[1])
    spelt = name in ("linear", "graphopt.skinny_linear")
    return spelt or (name == "addmm" and len(node.args) == 3)


def operands(linear: fx.Node) -> tuple[Any, Any, Any]:
    """Return (input, weight, bias); a transposition of the weight is undone."""
    if op_name(linear) == "addmm":
        bias, source, weight = linear.args[:3]
        return source, weight, bias
    source, weight = argument(linear, 0, "input"), argument(linear, 1, "weight")
    while isinstance(weight, fx.Node) and op_name(weight) in _TRANSPOSES:
        weight = weight.args[0]
    return source, weight, argument(linear, 2, "bias")


def _is_weight(value: Any) -> bool:
    while isinstance(value, fx.Node) and op_name(value) in _TRANSPOSES:
        value = value.args[0]
    is_input = isinstance(value, fx.Node) and value.op in ("placeholder", "get_attr")
    return is_input and len(shape_of(value) or ()) == 2
