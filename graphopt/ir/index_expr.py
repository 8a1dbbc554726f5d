"""Tensors as expressions over their indices, to read back masks that a model builds.

``le(arange(S)[None, :], arange(S)[:, None] + 3)`` becomes ``j0 <= j1 + 3``: ``J[0]`` is
the index on the last axis, ``J[1]`` on the last but one, so broadcasting renames
nothing. What is not understood becomes an opaque `Load` of the node at its indices.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from sympy.core.relational import Relational
from sympy.logic.boolalg import BooleanAtom, BooleanFunction
from torch import fx

from graphopt.ir.match import (
    argument,
    float_of,
    is_mutated,
    op_name,
    shape_of,
    size_expr,
    value_of,
)

J = tuple(sympy.Symbol(f"j{i}", integer=True, nonnegative=True) for i in range(8))

# Float masks hold this where a key is hidden (-inf, or the dtype's lowest number).
HIDDEN = sympy.Symbol("hidden")
_LOWEST = -1e4


class Load(sympy.Function):  # type: ignore[misc]
    """An element of a tensor that is not looked into: Load(number, *indices)."""

    is_integer = True
    is_real = True


@dataclass(frozen=True)
class Indexed:
    """A tensor of ``shape`` whose element at (..., j1, j0) is ``expr``."""

    shape: tuple[Any, ...]
    expr: Any

    @property
    def rank(self) -> int:
        """Return the number of axes."""
        return len(self.shape)


class Evaluator:
    """Evaluates nodes of one graph to `Indexed`; remembers what was opaque and why."""

    def __init__(self) -> None:
        self._memo: dict[fx.Node, Indexed | None] = {}
        self.loads: dict[int, fx.Node] = {}
        self._numbers: dict[fx.Node, int] = {}

    def tensor(self, node: Any) -> Indexed | None:
        """Return the expression of a tensor node; None when it is no tensor."""
        if not isinstance(node, fx.Node):
            return None
        if node not in self._memo:
            self._memo[node] = self._evaluate(node)
        return self._memo[node]

    def _evaluate(self, node: fx.Node) -> Indexed | None:
        if shape_of(node) is None:
            return None
        rule = _RULES.get(op_name(node))
        result = None
        if rule is not None and not is_mutated(node):
            try:
                result = rule(self, node)
            except (IndexError, TypeError, ValueError, NotImplementedError):
                result = None
        if result is not None and not _fits(result, node):
            result = None
        return result or self._load(node)

    def _load(self, node: fx.Node) -> Indexed:
        number = self._numbers.setdefault(node, len(self._numbers))
        self.loads[number] = node
        shape = _sizes(node)
        indices = [J[len(shape) - 1 - i] for i in range(len(shape))]
        indices = [0 if s == 1 else i for i, s in zip(indices, shape, strict=True)]
        value: Any = Load(number, *indices)
        if value_of(node).dtype == torch.bool:
            value = sympy.Ne(value, 0)
        return Indexed(shape, value)

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
            return Indexed((), size)
        number = float_of(value)
        if number is None:
            raise ValueError(f"{value} is neither tensor nor number")
        return Indexed((), HIDDEN if number <= _LOWEST else sympy.Float(number))


def _fits(result: Indexed, node: fx.Node) -> bool:
    """A rule that got the shape wrong has misread the operator."""
    shape = _sizes(node)
    return len(shape) == result.rank and all(
        sympy.simplify(a - b) == 0 for a, b in zip(shape, result.shape, strict=True)
    )


def _sizes(node: fx.Node) -> tuple[Any, ...]:
    return tuple(size_expr(s) for s in shape_of(node) or ())


def _broadcast(*operands: Indexed) -> tuple[Any, ...]:
    rank = max(o.rank for o in operands)
    shape = []
    for axis in range(rank):
        sizes = [o.shape[axis - rank + o.rank] for o in operands if axis >= rank - o.rank]
        wide = [s for s in sizes if s != 1]
        shape.append(wide[0] if wide else sympy.Integer(1))
    return tuple(shape)


def _pointwise(function: Callable[..., Any]) -> Callable[[Evaluator, fx.Node], Indexed]:
    def rule(evaluator: Evaluator, node: fx.Node) -> Indexed:
        operands = [evaluator.operand(a) for a in node.args]
        return Indexed(_broadcast(*operands), function(*(o.expr for o in operands)))

    return rule


def _is_boolean(expr: Any) -> bool:
    """Tell truth values from numbers (a sympy Symbol counts as both)."""
    return isinstance(expr, (bool, BooleanAtom, BooleanFunction, Relational))


def _boolean(expr: Any) -> Any:
    """Read a number as a truth value, as ``.bool()`` and logical operators do."""
    if _is_boolean(expr):
        return expr
    return sympy.Ne(expr, 0)


def _and(*parts: Any) -> Any:
    return sympy.And(*map(_boolean, parts))


def _or(*parts: Any) -> Any:
    return sympy.Or(*map(_boolean, parts))


def _add(left: Any, right: Any, alpha: Any = 1) -> Any:
    if _is_mask(left) and _is_mask(right):
        return _mask(sympy.And(_visible(left), _visible(right)))
    if any(_is_boolean(x) for x in (left, right)):
        raise ValueError("sum of truth values")
    if HIDDEN in left.free_symbols | right.free_symbols:
        raise ValueError("a sum with a hidden mark that is no mask")
    return left + alpha * right


def _mask(visible: Any) -> Any:
    """Return the float mask that is 0 where ``visible`` and hides elsewhere."""
    return sympy.Piecewise((sympy.Integer(0), visible), (HIDDEN, True))


def _is_mask(expr: Any) -> bool:
    return expr == 0 or expr == HIDDEN or isinstance(expr, sympy.Piecewise)


def _visible(expr: Any) -> Any:
    """Return where a float mask is 0; ValueError when it holds anything else."""
    if _is_boolean(expr):
        return expr
    if expr == 0:
        return sympy.true
    if expr == HIDDEN:
        return sympy.false
    if isinstance(expr, sympy.Piecewise) and len(expr.args) == 2:
        (first, condition), (second, _) = expr.args
        if (first, second) == (0, HIDDEN):
            return condition
        if (first, second) == (HIDDEN, 0):
            return sympy.Not(condition)
    raise ValueError(f"{expr} is no mask of zeros and hidden marks")


def visible(value: Indexed) -> Any:
    """Return the Boolean that is true where a bool or float mask lets a key be seen."""
    return _visible(value.expr)


def _where(condition: Any, first: Any, second: Any) -> Any:
    condition = _boolean(condition)
    if _is_boolean(first) and _is_boolean(second):
        return sympy.Or(
            sympy.And(condition, first), sympy.And(sympy.Not(condition), second)
        )
    if _is_mask(first) and _is_mask(second):
        shown = sympy.Or(
            sympy.And(condition, _visible(first)),
            sympy.And(sympy.Not(condition), _visible(second)),
        )
        return _mask(sympy.simplify_logic(shown, deep=False, force=False))
    return sympy.Piecewise((first, condition), (second, True))


def _arange(evaluator: Evaluator, node: fx.Node) -> Indexed:
    numbers = [evaluator.operand(a).expr for a in node.args]
    if "end" in node.kwargs:
        raise ValueError("arange by keyword")
    start = numbers[0] if len(numbers) > 1 else sympy.Integer(0)
    step = numbers[2] if len(numbers) > 2 else sympy.Integer(1)
    return Indexed(_sizes(node), start + step * J[0])


def _filled(value: Any) -> Callable[[Evaluator, fx.Node], Indexed]:
    def rule(evaluator: Evaluator, node: fx.Node) -> Indexed:
        is_bool = value_of(node).dtype == torch.bool
        filled = (sympy.true if value else sympy.false) if is_bool else value
        return Indexed(_sizes(node), sympy.sympify(filled))

    return rule


def _full(evaluator: Evaluator, node: fx.Node) -> Indexed:
    fill = argument(node, 2 if op_name(node) == "new_full" else 1, "fill_value")
    return Indexed(_sizes(node), evaluator.operand(fill).expr)


def _constant(evaluator: Evaluator, node: fx.Node) -> Indexed:
    value = node.args[0]
    if isinstance(value, (list, tuple)):
        raise ValueError("a table of constants")
    return Indexed((), evaluator.operand(value).expr)


def _cast(evaluator: Evaluator, node: fx.Node) -> Indexed:
    source = evaluator.operand(node.args[0])
    before, after = value_of(node.args[0]).dtype, value_of(node).dtype
    if after == torch.bool and before != torch.bool:
        if isinstance(source.expr, Load):
            raise ValueError("the cast itself is the tensor to load from")
        return Indexed(source.shape, _boolean(source.expr))
    if before == torch.bool and after != torch.bool:
        one, zero = sympy.Integer(1), sympy.Integer(0)
        return Indexed(source.shape, sympy.Piecewise((one, source.expr), (zero, True)))
    return source


def _same(evaluator: Evaluator, node: fx.Node) -> Indexed:
    return evaluator.operand(node.args[0])


def _expand(evaluator: Evaluator, node: fx.Node) -> Indexed:
    return Indexed(_sizes(node), evaluator.operand(node.args[0]).expr)


def _reindex(source: Indexed, indices: Sequence[Any], shape: Sequence[Any]) -> Indexed:
    """Return the tensor of ``shape`` whose element reads ``source`` at ``indices``."""
    old = {J[source.rank - 1 - axis]: index for axis, index in enumerate(indices)}
    return Indexed(tuple(shape), source.expr.subs(old, simultaneous=True))


def _unsqueeze(evaluator: Evaluator, node: fx.Node) -> Indexed:
    source = evaluator.operand(node.args[0])
    return _insert_axis(source, int(argument(node, 1, "dim")) % (source.rank + 1))


def _insert_axis(source: Indexed, axis: int) -> Indexed:
    shape = [*source.shape[:axis], sympy.Integer(1), *source.shape[axis:]]
    rank = len(shape)
    places = [a for a in range(rank) if a != axis]
    return _reindex(source, [J[rank - 1 - a] for a in places], shape)


def _reshape(evaluator: Evaluator, node: fx.Node) -> Indexed:
    """Only axes of size one may come and go."""
    source, shape = evaluator.operand(node.args[0]), _sizes(node)
    wide = [axis for axis, size in enumerate(shape) if size != 1]
    if [shape[a] for a in wide] != [s for s in source.shape if s != 1]:
        raise ValueError("a reshape that regroups axes")
    places = iter(wide)
    rank = len(shape)
    indices = [0 if s == 1 else J[rank - 1 - next(places)] for s in source.shape]
    return _reindex(source, indices, shape)


def _transpose(evaluator: Evaluator, node: fx.Node) -> Indexed:
    source = evaluator.operand(node.args[0])
    rank = source.rank
    first, second = (int(argument(node, i, f"dim{i - 1}")) % rank for i in (1, 2))
    order = list(range(rank))
    order[first], order[second] = order[second], order[first]
    indices = [J[rank - 1 - order[a]] for a in range(rank)]
    return _reindex(source, indices, [source.shape[a] for a in order])


def _getitem(evaluator: Evaluator, node: fx.Node) -> Indexed:
    source = evaluator.operand(node.args[0])
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    tensors = [evaluator.tensor(i) for i in index]
    if all(t is not None for t in tensors):
        return _gather(source, [t for t in tensors if t is not None])
    if any(t is not None for t in tensors):
        raise ValueError("slices mixed with index tensors")
    return _slice(evaluator, source, _without_ellipsis(index, source.rank))


def _gather(source: Indexed, tensors: Sequence[Indexed]) -> Indexed:
    shape = _broadcast(*tensors)
    rest = source.shape[len(tensors) :]
    rank = len(shape) + len(rest)
    shift = {J[i]: J[i + len(rest)] for i in range(len(shape))}
    indices = [t.expr.subs(shift, simultaneous=True) for t in tensors]
    indices += [J[len(rest) - 1 - i] for i in range(len(rest))]
    assert rank <= len(J)
    return _reindex(source, indices, (*shape, *rest))


def _without_ellipsis(index: Sequence[Any], rank: int) -> list[Any]:
    used = sum(i is not None and i is not Ellipsis for i in index)
    result: list[Any] = []
    for item in index:
        missing = rank - used if item is Ellipsis else 0
        result += [slice(None)] * missing if item is Ellipsis else [item]
    given = sum(i is not None for i in result)
    return result + [slice(None)] * (rank - given)


def _slice(evaluator: Evaluator, source: Indexed, index: Sequence[Any]) -> Indexed:
    axis, kept, shape, starts = 0, [], [], []
    for item in index:
        if item is None:
            shape.append(sympy.Integer(1))
            continue
        if not isinstance(item, slice):
            kept.append(None)
            starts.append(evaluator.operand(item).expr)
        else:
            size = source.shape[axis]
            start, stop = _bounds(evaluator, item, size)
            kept.append(len(shape))
            starts.append(start)
            shape.append(stop - start)
        axis += 1
    rank = len(shape)
    indices = [
        start if place is None else start + J[rank - 1 - place]
        for place, start in zip(kept, starts, strict=True)
    ]
    return _reindex(source, indices, shape)


def _bounds(evaluator: Evaluator, item: slice, size: Any) -> tuple[Any, Any]:
    if item.step not in (None, 1):
        raise ValueError("a slice with a step")
    start = sympy.Integer(0) if item.start is None else evaluator.operand(item.start).expr
    stop = size if item.stop is None else evaluator.operand(item.stop).expr
    start = size + start if start.is_negative else start
    stop = size + stop if stop.is_negative else stop
    if stop.is_number and size.is_number:
        stop = min(stop, size)
    return start, stop


def _triangle(lower: bool) -> Callable[[Evaluator, fx.Node], Indexed]:
    def rule(evaluator: Evaluator, node: fx.Node) -> Indexed:
        source = evaluator.operand(node.args[0])
        diagonal = evaluator.operand(argument(node, 1, "diagonal", 0)).expr
        kept = (
            sympy.Le(J[0], J[1] + diagonal) if lower else sympy.Ge(J[0], J[1] + diagonal)
        )
        if _is_boolean(source.expr):
            return Indexed(source.shape, sympy.And(source.expr, kept))
        zero = sympy.Integer(0)
        if source.expr == HIDDEN:
            return Indexed(source.shape, _mask(sympy.Not(kept)))
        return Indexed(source.shape, sympy.Piecewise((source.expr, kept), (zero, True)))

    return rule


def _diff(evaluator: Evaluator, node: fx.Node) -> Indexed:
    """Differences along the last axis, where the prepended one fits the others."""
    source = evaluator.operand(node.args[0])
    prepend = evaluator.operand(argument(node, 3, "prepend"))
    if argument(node, 1, "n", 1) != 1 or argument(node, 2, "dim", -1) != -1:
        raise ValueError("differences of another order or axis")
    inner = sympy.simplify(source.expr - source.expr.subs(J[0], J[0] - 1))
    first = sympy.simplify(source.expr.subs(J[0], 0) - prepend.expr.subs(J[0], 0))
    if inner.has(J[0]) or first != inner:
        raise ValueError("differences that vary")
    return Indexed(source.shape, inner)


def _cumsum(evaluator: Evaluator, node: fx.Node) -> Indexed:
    """Sums of nothing: packed-sequence numbers of rows that are not packed."""
    source = evaluator.operand(node.args[0])
    if source.expr not in (sympy.false, sympy.Integer(0)):
        raise ValueError("a running sum")
    return Indexed(source.shape, sympy.Integer(0))


def _masked_fill(evaluator: Evaluator, node: fx.Node) -> Indexed:
    source, condition, fill = (evaluator.operand(a) for a in node.args[:3])
    shape = _broadcast(source, condition)
    return Indexed(shape, _where(condition.expr, fill.expr, source.expr))


def _compare(relation: Any) -> Callable[..., Any]:
    def function(left: Any, right: Any) -> Any:
        booleans = [_is_boolean(x) for x in (left, right)]
        if any(booleans):
            raise ValueError("comparison of truth values")
        return relation(left, right)

    return function


_RULES: dict[str, Callable[[Evaluator, fx.Node], Indexed]] = {
    "arange": _arange,
    "add": _pointwise(_add),
    "sub": _pointwise(lambda a, b: _add(a, -b)),
    "mul": _pointwise(lambda a, b: a * b),
    "neg": _pointwise(lambda a: -a),
    "floor_divide": _pointwise(lambda a, b: sympy.floor(a / b)),
    "le": _pointwise(_compare(sympy.Le)),
    "lt": _pointwise(_compare(sympy.Lt)),
    "ge": _pointwise(_compare(sympy.Ge)),
    "gt": _pointwise(_compare(sympy.Gt)),
    "eq": _pointwise(_compare(sympy.Eq)),
    "ne": _pointwise(_compare(sympy.Ne)),
    "and": _pointwise(_and),
    "or": _pointwise(_or),
    "invert": _pointwise(lambda a: sympy.Not(_boolean(a))),
    "where": _pointwise(_where),
    "masked_fill": _masked_fill,
    "diff": _diff,
    "cumsum": _cumsum,
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
    "long": _cast,
    "int": _cast,
    "contiguous": _same,
    "clone": _same,
    "detach": _same,
    "alias": _same,
    "expand": _expand,
    "unsqueeze": _unsqueeze,
    "squeeze": _reshape,
    "reshape": _reshape,
    "transpose": _transpose,
    "getitem": _getitem,
    "tril": _triangle(lower=True),
    "triu": _triangle(lower=False),
}

__all__ = ["HIDDEN", "Evaluator", "Indexed", "J", "Load", "visible"]
