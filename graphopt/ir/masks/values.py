"""What the elements of a mask can be: truth values, numbers, and hiding numbers.

Truth values are sympy Booleans over the index symbols; a number that depends on a truth
value is `Choose`. A float mask is 0 where a key is visible and minus infinity, or the
lowest number of its dtype, where it is hidden.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import sympy
from sympy.core.relational import Relational
from sympy.logic.boolalg import BooleanAtom, BooleanFunction

# Index of an element, from the last axis: J[0] is the key, J[1] the query row, J[2] the
# head and J[3] the batch row of a mask. Broadcasting renames nothing this way.
J = tuple(sympy.Symbol(f"j{i}", integer=True, nonnegative=True) for i in range(8))
KEY, QUERY, HEAD, BATCH = J[:4]

# A finite number that hides a key: exp(score + LOWEST) is 0 beside any visible key.
LOWEST = sympy.Symbol("lowest", negative=True)
# The lowest float16. Scores differ by far less, so that exp() underflows to 0.
_HIDING = -65504.0


class UnknownOperatorError(ValueError):
    """An operator, or a use of one, that has no expression; the message names it."""


class Load(sympy.Function):
    """An element of a tensor that is not looked into: Load(number, *indices)."""

    is_real = True
    is_commutative = True


class Choose(sympy.Function):
    """Choose(condition, first, second): a number that a truth value selects."""

    nargs = 3


def number(value: float) -> Any:
    """Return a float literal as an element; numbers that hide become LOWEST or -oo."""
    if value == float("-inf"):
        return sympy.S.NegativeInfinity
    if value <= _HIDING:
        return LOWEST
    return sympy.Integer(int(value)) if value == int(value) else sympy.Float(value)


def is_boolean(expr: Any) -> bool:
    """Tell truth values from numbers (a sympy Symbol counts as both)."""
    return isinstance(expr, (BooleanAtom, BooleanFunction, Relational))


def boolean(expr: Any) -> Any:
    """Read a number as a truth value, as ``.bool()`` and logical operators do."""
    if is_boolean(expr):
        return expr
    if isinstance(expr, Choose):
        condition, first, second = expr.args
        return choose(condition, boolean(first), boolean(second))
    if expr in (LOWEST, sympy.S.NegativeInfinity):
        return sympy.true
    return sympy.Ne(expr, 0)


def numeric(expr: Any) -> Any:
    """Read a truth value as the number 0 or 1."""
    if expr == sympy.true or expr == sympy.false:
        return sympy.Integer(int(expr == sympy.true))
    return Choose(expr, 1, 0) if is_boolean(expr) else expr


def choose(condition: Any, first: Any, second: Any) -> Any:
    """Return ``first`` where ``condition``, else ``second``; both of one kind."""
    if condition == sympy.true:
        return first
    if condition == sympy.false:
        return second
    if is_boolean(first) and is_boolean(second):
        return _choose_boolean(condition, first, second)
    if is_boolean(first) or is_boolean(second):
        first, second = numeric(first), numeric(second)
    return first if first == second else Choose(condition, first, second)


def _choose_boolean(condition: Any, first: Any, second: Any) -> Any:
    return sympy.Or(
        sympy.And(condition, first), sympy.And(sympy.Not(condition), second)
    )


def lift(function: Callable[..., Any], *operands: Any) -> Any:
    """Apply arithmetic on numbers to operands that may be `Choose` or truth values."""
    operands = tuple(numeric(o) for o in operands)
    for place, operand in enumerate(operands):
        if isinstance(operand, Choose):
            condition, *sides = operand.args
            before, after = operands[:place], operands[place + 1 :]
            first, second = (lift(function, *before, s, *after) for s in sides)
            return choose(condition, first, second)
    result = sympy.sympify(function(*operands))
    if result is sympy.nan:
        raise UnknownOperatorError("a mask that holds NaN")
    return result


def add(left: Any, right: Any) -> Any:
    """Return a sum; whatever is added to a hiding number still hides."""
    for hidden in (sympy.S.NegativeInfinity, LOWEST):
        if hidden in (left, right):
            return hidden
    return left + right


def multiply(left: Any, right: Any) -> Any:
    """Return a product; LOWEST keeps its meaning only under factors of 0 and 1."""
    for factor, other in ((left, right), (right, left)):
        if other == LOWEST:
            if factor in (0, 1):
                return factor * other
            raise UnknownOperatorError("a product with a hiding number")
    return left * right


def visible(expr: Any) -> tuple[Any, bool]:
    """Return where a bool or float mask shows a key, and whether it hides finitely.

    Raises UnknownOperatorError for elements other than 0 and hiding numbers.
    """
    if is_boolean(expr):
        return expr, False
    if expr == 0:
        return sympy.true, False
    if expr in (LOWEST, sympy.S.NegativeInfinity):
        return sympy.false, expr == LOWEST
    if isinstance(expr, Choose):
        condition, *sides = expr.args
        (first, finite), (second, also) = (visible(side) for side in sides)
        return choose(condition, first, second), finite or also
    if isinstance(expr, Load):
        raise UnknownOperatorError("the mask is data")
    raise UnknownOperatorError("an additive bias")
