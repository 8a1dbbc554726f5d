"""Slices of a tensor's channels (the last axis), and how they are put together."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from torch import fx

from graphopt.ir.casts import skip_casts
from graphopt.ir.match import argument, op_name, shape_of
from graphopt.ir.stream.trunk import width

_SPLITS = ("chunk", "split", "tensor_split")
_FLATTENS = ("reshape", "reshape_as", "flatten")
JOINS = ("cat", *_FLATTENS)


@dataclass(frozen=True)
class Half:
    """Half ``index`` (0 or 1) of the channels of ``source``.

    ``form`` is half (the first or second half) or interleaved (the even or odd ones).
    """

    source: fx.Node
    form: str
    index: int


def are_halves(first: Half | None, second: Half | None) -> bool:
    """Tell whether the two are the first and the second half of one tensor."""
    if first is None or second is None or first.index != 0:
        return False
    return second == replace(first, index=1)


def half_of(node: fx.Node) -> Half | None:
    """Read ``node`` as half of the channels of another tensor."""
    node = skip_casts(node)
    source, size = sliced_channels(node), width(node)
    if source is None or size is None or 2 * size != width(source):
        return None
    index: Any = node.args[1]
    if isinstance(index, int):
        return Half(source, "half", index) if index in (0, 1) else None
    last = index[-1]
    if last.step in (None, 1):
        starts = {None: 0, 0: 0, size: 1, -size: 1}
        place = starts.get(last.start) if not isinstance(last.start, fx.Node) else None
        return None if place is None else Half(source, "half", place)
    known = last.step == 2 and last.stop is None and last.start in (None, 0, 1)
    return Half(source, "interleaved", last.start or 0) if known else None


def sliced_channels(node: fx.Node) -> fx.Node | None:
    """Return the tensor of whose channels ``node`` is a slice; casts are skipped."""
    node = skip_casts(node)
    if op_name(node) != "getitem":
        return None
    source, index = node.args[:2]
    if not isinstance(source, fx.Node):
        return None
    if isinstance(index, int) and op_name(source) in _SPLITS:
        return _split_channels(source)
    if not isinstance(index, tuple) or not isinstance(index[-1], slice):
        return None
    others = all(i is Ellipsis or i == slice(None) for i in index[:-1])
    reaches = index[0] is Ellipsis or len(index) == len(shape_of(source) or ())
    return skip_casts(source) if others and reaches else None


def _split_channels(split: fx.Node) -> fx.Node | None:
    whole = split.args[0]
    if not isinstance(whole, fx.Node):
        return None
    axis = argument(split, 2, "dim", 0)
    return skip_casts(whole) if axis in (-1, len(shape_of(whole) or ()) - 1) else None


def joined(node: fx.Node) -> tuple[fx.Node, fx.Node, str] | None:
    """Return two parts of the channels and the form in which ``node`` joins them.

    half: a cat; interleaved: a stack on a new last axis, then flattened.
    """
    name = op_name(node)
    if name == "cat":
        parts = _two(node)
        return (*parts, "half") if parts else None
    stack: Any = node.args[0] if name in _FLATTENS and node.args else None
    if not isinstance(stack, fx.Node) or op_name(stack) != "stack":
        return None
    parts = _two(stack)
    doubled = parts is not None and width(node) == 2 * (width(parts[0]) or 0)
    return (*parts, "interleaved") if parts and doubled else None


def _two(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Return the operands of a cat or stack of two on the last axis."""
    items = argument(node, 0, "tensors")
    axis = argument(node, 1, "dim", argument(node, 1, "axis", 0))
    if axis not in (-1, len(shape_of(node) or ()) - 1):
        return None
    if not isinstance(items, (list, tuple)) or len(items) != 2:
        return None
    both = all(isinstance(item, fx.Node) for item in items)
    return (items[0], items[1]) if both else None
