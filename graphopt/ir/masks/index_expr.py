"""Tensors as expressions over their indices, to read back masks that a model builds.

``le(arange(S)[None, :], arange(S)[:, None] + 3)`` becomes ``j0 <= j1 + 3``. What is not
understood becomes an opaque `Load` of the node at its indices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx

from graphopt.ir.aliases import Aliases
from graphopt.ir.masks.values import J, Load, UnknownOperatorError, number
from graphopt.ir.match import (
    float_of,
    op_name,
    same_size,
    shape_of,
    size_expr,
    sizes_of,
    value_of,
)


@dataclass(frozen=True)
class Indexed:
    """A tensor of ``shape`` whose element at (..., j1, j0) is ``expr``."""

    shape: tuple[Any, ...]
    expr: Any

    @property
    def rank(self) -> int:
        """Return the number of axes."""
        return len(self.shape)


Rule = Callable[["Evaluator", fx.Node], Indexed]


class Evaluator:
    """Evaluates nodes of one graph to `Indexed`; remembers what stayed opaque and why.

    ``loads[n]`` is the node behind ``Load(n, ...)``, ``reasons[n]`` why it was not
    looked into ("" for an input).
    """

    def __init__(self, graph: fx.Graph, rules: dict[str, Rule] | None = None) -> None:
        from graphopt.ir.masks.rules import RULES

        self._rules = RULES if rules is None else rules
        self._memo: dict[fx.Node, Indexed | None] = {}
        self._numbers: dict[fx.Node, int] = {}
        self.aliases = Aliases(graph)
        self.loads: dict[int, fx.Node] = {}
        self.reasons: dict[int, str] = {}

    def tensor(self, node: Any) -> Indexed | None:
        """Return the expression of a tensor node; None when it is no tensor."""
        if not isinstance(node, fx.Node) or shape_of(node) is None:
            return None
        if node not in self._memo:
            self._memo[node] = self._evaluate(node)
        return self._memo[node]

    def _evaluate(self, node: fx.Node) -> Indexed:
        rule = self._rules.get(op_name(node))
        if rule is None or len(sizes_of(node)) > len(J) // 2:
            return self._load(node, _unknown(node))
        if self.aliases.is_written(node):
            return self._load(node, f"{node.name} is written in place")
        try:
            result = _checked(rule(self, node), node)
        except UnknownOperatorError as error:
            return self._load(node, f"{op_name(node)}: {error}")
        return self._load(node, "") if self._is_row_data(node, result) else result

    def _is_row_data(self, node: fx.Node, value: Indexed) -> bool:
        """A [B, S] truth value made of data alone is a key mask, however computed."""
        if value.rank > 2 or value_of(node).dtype != torch.bool:
            return False
        loads = value.expr.atoms(Load)
        if not loads or value.expr in {sympy.Ne(load, 0) for load in loads}:
            sources = [self.loads[int(load.args[0])] for load in loads]
            return any(value_of(source).dtype != torch.bool for source in sources)
        data = {load: sympy.Dummy(real=True) for load in loads}
        return not value.expr.xreplace(data).free_symbols & set(J)

    def _load(self, node: fx.Node, reason: str) -> Indexed:
        place = self._numbers.setdefault(node, len(self._numbers))
        self.loads[place], self.reasons[place] = node, reason
        shape = sizes_of(node)
        indices = [J[len(shape) - 1 - axis] for axis in range(len(shape))]
        value: Any = Load(place, *indices)
        if value_of(node).dtype == torch.bool:
            value = sympy.Ne(value, 0)
        return _normal(Indexed(shape, value))

    def operand(self, value: Any) -> Indexed:
        """Return a tensor, size or number as an expression (rank 0 for scalars)."""
        found = self.tensor(value)
        if found is not None:
            return found
        known = value_of(value)
        if isinstance(known, bool):
            return Indexed((), sympy.true if known else sympy.false)
        size = size_expr(value)
        if size is not None:
            # Integers may hide too, as in masked_fill(mask, -1e9) of an int literal.
            return Indexed((), number(float(size)) if size.is_Integer else size)
        literal = float_of(value)
        if literal is None:
            raise UnknownOperatorError(f"{value} is neither tensor nor known number")
        return Indexed((), number(literal))


def _unknown(node: fx.Node) -> str:
    return "" if node.op == "placeholder" else f"operator {op_name(node)}"


def _checked(result: Indexed, node: fx.Node) -> Indexed:
    """A rule that got the shape wrong has misread the operator."""
    shape = sizes_of(node)
    if len(shape) != result.rank or not all(map(same_size, shape, result.shape)):
        raise UnknownOperatorError(f"sizes {result.shape} where {shape} was expected")
    return _normal(Indexed(shape, result.expr))


def _normal(value: Indexed) -> Indexed:
    """The index on an axis of size one is 0, so that broadcasting keeps the element."""
    single = {J[value.rank - 1 - a]: 0 for a, s in enumerate(value.shape) if s == 1}
    if not single or not value.expr.free_symbols & set(single):
        return value
    return Indexed(value.shape, value.expr.subs(single, simultaneous=True))


def broadcast(*operands: Indexed) -> tuple[Any, ...]:
    """Return the common shape; UnknownOperatorError when sizes may differ."""
    rank = max(o.rank for o in operands)
    shape = []
    for axis in range(-rank, 0):
        sizes = [o.shape[axis] for o in operands if o.rank >= -axis]
        wide = [s for s in sizes if s != 1]
        if not all(same_size(s, wide[0]) for s in wide):
            raise UnknownOperatorError(f"sizes {wide} that may differ")
        shape.append(wide[0] if wide else sympy.Integer(1))
    return tuple(shape)


def reindex(source: Indexed, indices: Sequence[Any], shape: Sequence[Any]) -> Indexed:
    """Return the tensor of ``shape`` whose element reads ``source`` at ``indices``."""
    old = {J[source.rank - 1 - axis]: index for axis, index in enumerate(indices)}
    return Indexed(tuple(shape), source.expr.subs(old, simultaneous=True))
