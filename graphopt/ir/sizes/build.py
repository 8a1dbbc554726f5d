"""Build nodes for symbolic sizes."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import fx

from graphopt.ir.match import size_expr, value_of

# By name: torch has a Max and Min of its own. A sliding cache keeps at most its window.
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "Add": operator.add,
    "Mul": operator.mul,
    "Max": torch.sym_max,
    "Min": torch.sym_min,
}


def size_argument(graph: fx.Graph, expr: Any, sources: list[fx.Node]) -> Any:
    """Return ``expr`` as an argument: an int, or a node with that SymInt value.

    ``sources`` are tensors from whose shapes symbols may be read. New nodes go to the
    graph's insertion point. Raises ValueError for a symbol that no source shows.
    """
    expr = sympy.sympify(expr)
    if expr.is_Integer:
        return int(expr)
    for node in graph.find_nodes(op="placeholder"):
        if isinstance(value_of(node), torch.SymInt) and size_expr(node) == expr:
            return node
    for source in sources:
        for axis, size in enumerate(value_of(source).shape):
            if size_expr(size) == expr:
                return _node(graph, torch.ops.aten.sym_size.int, (source, axis), size)
    function = _FUNCTIONS.get(type(expr).__name__)
    if function is None:
        raise ValueError(f"no input shows the size {expr}")
    parts = [size_argument(graph, part, sources) for part in expr.args]
    total = parts[0]
    for part in parts[1:]:
        value = function(_value(total), _value(part))
        total = _node(graph, function, (total, part), value)
    return total


def _value(argument: Any) -> Any:
    return value_of(argument)


def _node(graph: fx.Graph, target: Any, args: tuple[Any, ...], value: Any) -> fx.Node:
    node = graph.call_function(target, args)
    node.meta["example_value"] = value
    return node
