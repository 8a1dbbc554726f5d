"""Expressions of the elementwise and creating operators that masks are built from."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import sympy
import torch
from torch import fx

from graphopt.ir.masks.index_expr import Evaluator, Indexed, Rule, broadcast
from graphopt.ir.masks.packing import PACKING_RULES
from graphopt.ir.masks.shapes import SHAPE_RULES
from graphopt.ir.masks.values import (
    Choose,
    J,
    UnknownOperatorError,
    add,
    boolean,
    choose,
    is_boolean,
    lift,
    multiply,
    numeric,
)
from graphopt.ir.match import argument, op_name, sizes_of, value_of


def _pointwise(function: Callable[..., Any], count: int) -> Rule:
    def rule(evaluator: Evaluator, node: fx.Node) -> Indexed:
        names = [("input", "self", "condition"), ("other",), ("other",)]
        given = list(node.args[:count])
        for place in range(len(given), count):
            given += [node.kwargs[n] for n in names[place] if n in node.kwargs]
        if len(given) != count or len(node.args) > count or "alpha" in node.kwargs:
            raise UnknownOperatorError("unexpected arguments")
        operands = [evaluator.operand(a) for a in given]
        return Indexed(broadcast(*operands), function(*(o.expr for o in operands)))

    return rule


def _arithmetic(function: Callable[..., Any], count: int = 2) -> Rule:
    return _pointwise(lambda *operands: lift(function, *operands), count)


def _compare(relation: Any) -> Rule:
    def function(left: Any, right: Any) -> Any:
        if left in (sympy.true, sympy.false) or right in (sympy.true, sympy.false):
            left, right = numeric(left), numeric(right)
        return _compared(relation, left, right)

    return _pointwise(function, 2)


def _compared(relation: Any, left: Any, right: Any) -> Any:
    left, right = numeric(left), numeric(right)
    for place, side in enumerate((left, right)):
        if isinstance(side, Choose):
            condition, *values = side.args
            pairs = [(v, right) if place == 0 else (left, v) for v in values]
            first, second = (_compared(relation, *pair) for pair in pairs)
            return choose(condition, first, second)
    return relation(left, right)


def _logical(function: Any) -> Callable[..., Any]:
    def apply(*operands: Any) -> Any:
        # On integers, & and | work on bits; truth values only where both sides are.
        if not all(is_boolean(o) for o in operands):
            raise UnknownOperatorError("bits of numbers")
        return function(*operands)

    return apply


def _logical_any(function: Any) -> Callable[..., Any]:
    return lambda *operands: function(*map(boolean, operands))


def _by_spelling(function: Any, count: int) -> Rule:
    """``logical_and`` reads numbers as truth values, ``&`` does not."""
    loose = _pointwise(_logical_any(function), count)
    strict = _pointwise(_logical(function), count)

    def rule(evaluator: Evaluator, node: fx.Node) -> Indexed:
        logical = "logical" in str(getattr(node.target, "__name__", node.target))
        return (loose if logical else strict)(evaluator, node)

    return rule


def _arange(evaluator: Evaluator, node: fx.Node) -> Indexed:
    numbers = [evaluator.operand(a).expr for a in node.args]
    numbers += [evaluator.operand(node.kwargs[k]).expr for k in _given(node)]
    start = numbers[0] if len(numbers) > 1 else sympy.Integer(0)
    step = numbers[2] if len(numbers) > 2 else sympy.Integer(1)
    if value_of(node).dtype.is_floating_point:
        raise UnknownOperatorError("positions that are not integers")
    return Indexed(sizes_of(node), start + step * J[0])


def _given(node: fx.Node) -> list[str]:
    return [k for k in ("start", "end", "step") if k in node.kwargs]


def _filled(value: int) -> Rule:
    def rule(evaluator: Evaluator, node: fx.Node) -> Indexed:
        return Indexed(sizes_of(node), _typed(sympy.Integer(value), node))

    return rule


def _typed(expr: Any, node: fx.Node) -> Any:
    """Return a number as an element of the dtype of ``node``."""
    return boolean(expr) if value_of(node).dtype == torch.bool else numeric(expr)


def _full(evaluator: Evaluator, node: fx.Node) -> Indexed:
    place = 2 if op_name(node) == "new_full" else 1
    fill = evaluator.operand(argument(node, place, "fill_value"))
    return Indexed(sizes_of(node), _typed(fill.expr, node))


def _constant(evaluator: Evaluator, node: fx.Node) -> Indexed:
    value = argument(node, 0, "data")
    if isinstance(value, (list, tuple)):
        raise UnknownOperatorError("a table of constants")
    return Indexed((), _typed(evaluator.operand(value).expr, node))


def _cast(evaluator: Evaluator, node: fx.Node) -> Indexed:
    source = evaluator.operand(argument(node, 0, "input"))
    before, after = value_of(node.args[0]).dtype, value_of(node).dtype
    if after == before:
        return source
    if after == torch.bool or before == torch.bool:
        return Indexed(source.shape, _typed(source.expr, node))
    if before.is_floating_point and not after.is_floating_point:
        raise UnknownOperatorError("rounding")
    return source


def _where(evaluator: Evaluator, node: fx.Node) -> Indexed:
    return _pointwise(lambda c, a, b: choose(boolean(c), a, b), 3)(evaluator, node)


def _masked_fill(evaluator: Evaluator, node: fx.Node) -> Indexed:
    given = [argument(node, i, n) for i, n in enumerate(("input", "mask", "value"))]
    source, condition, fill = (evaluator.operand(a) for a in given)
    filled = choose(boolean(condition.expr), fill.expr, source.expr)
    return Indexed(broadcast(source, condition), filled)


def _triangle(lower: bool) -> Rule:
    def rule(evaluator: Evaluator, node: fx.Node) -> Indexed:
        source = evaluator.operand(argument(node, 0, "input"))
        diagonal = evaluator.operand(argument(node, 1, "diagonal", 0)).expr
        kept = (sympy.Le if lower else sympy.Ge)(J[0], J[1] + diagonal)
        zero = sympy.false if is_boolean(source.expr) else sympy.Integer(0)
        return Indexed(source.shape, choose(kept, source.expr, zero))

    return rule


def _floor_divide(left: Any, right: Any) -> Any:
    return sympy.floor(left / right)


def _divide(evaluator: Evaluator, node: fx.Node) -> Indexed:
    mode = node.kwargs.get("rounding_mode")
    if mode not in (None, "floor"):
        raise UnknownOperatorError(f"rounding mode {mode}")
    left, right = (evaluator.operand(a) for a in node.args[:2])
    function = _floor_divide if mode else operator.truediv
    return Indexed(broadcast(left, right), lift(function, left.expr, right.expr))


RULES: dict[str, Rule] = {
    **SHAPE_RULES,
    **PACKING_RULES,
    "arange": _arange,
    "add": _arithmetic(add),
    "sub": _arithmetic(lambda a, b: add(a, multiply(b, sympy.Integer(-1)))),
    "rsub": _arithmetic(lambda a, b: add(b, multiply(a, sympy.Integer(-1)))),
    "mul": _arithmetic(multiply),
    "neg": _arithmetic(operator.neg, 1),
    "abs": _arithmetic(sympy.Abs, 1),
    "floor_divide": _arithmetic(_floor_divide),
    "div": _divide,
    "le": _compare(sympy.Le),
    "lt": _compare(sympy.Lt),
    "ge": _compare(sympy.Ge),
    "gt": _compare(sympy.Gt),
    "eq": _compare(sympy.Eq),
    "ne": _compare(sympy.Ne),
    "and": _by_spelling(sympy.And, 2),
    "or": _by_spelling(sympy.Or, 2),
    "xor": _by_spelling(sympy.Xor, 2),
    "invert": _by_spelling(sympy.Not, 1),
    "where": _where,
    "masked_fill": _masked_fill,
    "ones": _filled(1),
    "new_ones": _filled(1),
    "ones_like": _filled(1),
    "zeros": _filled(0),
    "new_zeros": _filled(0),
    "zeros_like": _filled(0),
    "full": _full,
    "new_full": _full,
    "full_like": _full,
    "tensor": _constant,
    "to": _cast,
    "bool": _cast,
    "float": _cast,
    "half": _cast,
    "bfloat16": _cast,
    "double": _cast,
    "long": _cast,
    "int": _cast,
    "type_as": _cast,
    "tril": _triangle(lower=True),
    "triu": _triangle(lower=False),
}
