"""Expressions of packed-sequence numbers, for rows that are not packed.

A model that supports packed rows numbers the sequences of a row by counting where its
positions do not rise by one. For positions that are a plain range the count is zero.
"""

from __future__ import annotations

import sympy
from torch import fx

from graphopt.ir.masks.index_expr import Evaluator, Indexed, Rule
from graphopt.ir.masks.values import J, UnknownOperatorError, numeric
from graphopt.ir.match import argument


def _diff(evaluator: Evaluator, node: fx.Node) -> Indexed:
    """Differences along the last axis, where the prepended one fits the others."""
    source = evaluator.operand(node.args[0])
    prepend = evaluator.operand(argument(node, 3, "prepend"))
    if argument(node, 1, "n", 1) != 1 or argument(node, 2, "dim", -1) != -1:
        raise UnknownOperatorError("differences of another order or axis")
    inner = sympy.simplify(source.expr - source.expr.subs(J[0], J[0] - 1))
    first = sympy.simplify(source.expr.subs(J[0], 0) - prepend.expr.subs(J[0], 0))
    if inner.has(J[0]) or first != inner:
        raise UnknownOperatorError("differences that vary")
    return Indexed(source.shape, inner)


def _cumsum(evaluator: Evaluator, node: fx.Node) -> Indexed:
    source = evaluator.operand(node.args[0])
    if numeric(source.expr) != 0:
        raise UnknownOperatorError("a running sum")
    return Indexed(source.shape, sympy.Integer(0))


PACKING_RULES: dict[str, Rule] = {"diff": _diff, "cumsum": _cumsum}
