"""Expressions of the operators that move the elements of a mask."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
from torch import fx

from graphopt.ir.masks.index_expr import Evaluator, Indexed, Rule, broadcast, reindex
from graphopt.ir.masks.values import J, UnknownOperatorError
from graphopt.ir.match import argument, op_name, sizes_of


def _same(evaluator: Evaluator, node: fx.Node) -> Indexed:
    return evaluator.operand(argument(node, 0, "input"))


def _expand(evaluator: Evaluator, node: fx.Node) -> Indexed:
    return Indexed(sizes_of(node), evaluator.operand(node.args[0]).expr)


def _unsqueeze(evaluator: Evaluator, node: fx.Node) -> Indexed:
    source = evaluator.operand(node.args[0])
    axis = int(argument(node, 1, "dim")) % (source.rank + 1)
    shape = [*source.shape[:axis], sympy.Integer(1), *source.shape[axis:]]
    rank = len(shape)
    places = [a for a in range(rank) if a != axis]
    return reindex(source, [J[rank - 1 - a] for a in places], shape)


def _reshape(evaluator: Evaluator, node: fx.Node) -> Indexed:
    """Only axes of size one may come and go."""
    source, shape = evaluator.operand(node.args[0]), sizes_of(node)
    wide = [axis for axis, size in enumerate(shape) if size != 1]
    if [shape[a] for a in wide] != [s for s in source.shape if s != 1]:
        raise UnknownOperatorError("axes are regrouped")
    places, rank = iter(wide), len(shape)
    indices = [0 if s == 1 else J[rank - 1 - next(places)] for s in source.shape]
    return reindex(source, indices, shape)


def _permute(evaluator: Evaluator, node: fx.Node) -> Indexed:
    source = evaluator.operand(node.args[0])
    order = _axis_order(node, source.rank)
    indices: list[Any] = [None] * source.rank
    for new, old in enumerate(order):
        indices[old] = J[source.rank - 1 - new]
    return reindex(source, indices, [source.shape[a] for a in order])


def _axis_order(node: fx.Node, rank: int) -> list[int]:
    """Return, for each axis of a transposed or permuted tensor, its axis before."""
    if op_name(node) == "permute":
        given: Any = node.args[1:] if len(node.args) > 2 else argument(node, 1, "dims")
        given = given[0] if isinstance(given[0], (list, tuple)) else given
        return [int(axis) % rank for axis in given]
    first, second = (int(argument(node, i, f"dim{i - 1}")) % rank for i in (1, 2))
    order = list(range(rank))
    order[first], order[second] = second, first
    return order


def _getitem(evaluator: Evaluator, node: fx.Node) -> Indexed:
    source = evaluator.operand(node.args[0])
    given = node.args[1]
    index = list(given) if isinstance(given, (tuple, list)) else [given]
    if op_name(node) == "index":  # aten spells a full slice None
        index = [slice(None) if i is None else i for i in index]
    index = _without_ellipsis(index, source.rank)
    tensors = [evaluator.tensor(i) for i in index if isinstance(i, fx.Node)]
    found = [t for t in tensors if t is not None and t.rank > 0]
    if not found:
        return _slice(evaluator, source, index, sizes_of(node))
    gathered = [evaluator.tensor(i) for i in index[: len(found)]]
    if any(t is None for t in gathered) or index[len(found) :] != [slice(None)] * (
        source.rank - len(found)
    ):
        raise UnknownOperatorError("slices mixed with index tensors")
    return _gather(source, found)


def _gather(source: Indexed, tensors: Sequence[Indexed]) -> Indexed:
    """Read ``source`` at index tensors on its leading axes."""
    shape = broadcast(*tensors)
    rest = source.shape[len(tensors) :]
    if len(shape) + len(rest) > len(J):
        raise UnknownOperatorError("too many axes")
    shift = {J[i]: J[i + len(rest)] for i in range(len(shape))}
    indices = [t.expr.subs(shift, simultaneous=True) for t in tensors]
    indices += [J[len(rest) - 1 - i] for i in range(len(rest))]
    return reindex(source, indices, (*shape, *rest))


def _without_ellipsis(index: Sequence[Any], rank: int) -> list[Any]:
    used = sum(i is not None and i is not Ellipsis for i in index)
    result: list[Any] = []
    for item in index:
        result += [slice(None)] * (rank - used) if item is Ellipsis else [item]
    given = sum(i is not None for i in result)
    return result + [slice(None)] * (rank - given)


def _slice(
    evaluator: Evaluator, source: Indexed, index: Sequence[Any], shape: tuple[Any, ...]
) -> Indexed:
    """Index by slices, None and integers; ``shape`` is the result's."""
    axis, place, rank = 0, 0, len(shape)
    indices: list[Any] = []
    for item in index:
        if item is None:
            place += 1
            continue
        size = source.shape[axis]
        axis += 1
        if isinstance(item, slice):
            start = _start(evaluator, item, size, shape[place])
            indices.append(start + J[rank - 1 - place])
            place += 1
        else:
            indices.append(_wrapped(evaluator.operand(item).expr, size))
    return reindex(source, indices, shape)


def _start(evaluator: Evaluator, item: slice, size: Any, result: Any) -> Any:
    """Return where a slice begins; ``result`` is the number of elements it has."""
    if item.step not in (None, 1):
        raise UnknownOperatorError("a slice with a step")
    if item.start is None or size == result:
        return sympy.Integer(0)
    start = evaluator.operand(item.start).expr
    if start.is_nonnegative:
        return start
    if item.stop is None:
        return size - result  # the last elements, however many there are
    raise UnknownOperatorError(f"a slice from {start}")


def _wrapped(index: Any, size: Any) -> Any:
    if index.is_nonnegative:
        return index
    if index.is_negative:
        return size + index
    raise UnknownOperatorError(f"an index {index} of unknown sign")


def _aten_slice(evaluator: Evaluator, node: fx.Node) -> Indexed:
    source = evaluator.operand(node.args[0])
    axis = int(argument(node, 1, "dim", 0)) % source.rank
    start, stop, step = (argument(node, i, n) for i, n in enumerate(_SLICE, start=2))
    index: list[Any] = [slice(None)] * source.rank
    index[axis] = slice(start, stop, step)
    return _slice(evaluator, source, index, sizes_of(node))


_SLICE = ("start", "end", "step")


def _narrow(evaluator: Evaluator, node: fx.Node) -> Indexed:
    source = evaluator.operand(node.args[0])
    axis, start = (argument(node, i, n) for i, n in ((1, "dim"), (2, "start")))
    index: list[Any] = [slice(None)] * source.rank
    index[int(axis) % source.rank] = slice(start, None, None)
    return _slice(evaluator, source, index, sizes_of(node))


SHAPE_RULES: dict[str, Rule] = {
    "contiguous": _same,
    "clone": _same,
    "detach": _same,
    "alias": _same,
    "lift_fresh_copy": _same,
    "expand": _expand,
    "expand_as": _expand,
    "unsqueeze": _unsqueeze,
    "squeeze": _reshape,
    "reshape": _reshape,
    "transpose": _permute,
    "permute": _permute,
    "getitem": _getitem,
    "index": _getitem,
    "slice": _aten_slice,
    "narrow": _narrow,
}
