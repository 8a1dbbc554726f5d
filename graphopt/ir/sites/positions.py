"""Trace the positions from which a rotary embedding's cos and sin are computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt.ir.casts import CASTS
from graphopt.ir.match import argument, op_name, shape_of, value_of

_VIEWS = ("unsqueeze", "expand", "repeat", "reshape", "contiguous", "clone", "long")
_MAX_NODES = 64  # between cos and the positions; more than any architecture has


@dataclass(frozen=True)
class Positions:
    """``node`` holds the positions of the tokens, [B or 1, S] (or [3, B, S]), integers.

    ``source`` is arange (a range from a known start), input (``position_ids`` that the
    caller gave), or computed (from a mask, say).
    """

    node: fx.Node
    source: str


def trace_positions(cos: fx.Node) -> Positions | None:
    """Return the positions behind ``cos``, or None when not exactly one is found."""
    found: list[fx.Node] = []
    pending, seen = [cos], {cos}
    while pending and len(seen) < _MAX_NODES:
        node = pending.pop()
        if _is_integer(node):
            found.append(_without_channel_axis(node))
            continue
        fresh = [n for n in node.all_input_nodes if n not in seen]
        seen.update(fresh)
        pending += [n for n in fresh if _is_tensors(n)]
    if pending or len(set(found)) != 1:
        return None
    return Positions(found[0], _origin(found[0]))


def _is_tensors(node: fx.Node) -> bool:
    """Tell whether ``node`` is a tensor or several, as of a split; not a size."""
    return isinstance(value_of(node), (torch.Tensor, tuple, list))


def _is_integer(node: fx.Node) -> bool:
    value = value_of(node)
    whole = isinstance(value, torch.Tensor) and value.dtype in (
        torch.int64,
        torch.int32,
    )
    return whole and value.dim() > 0


def _without_channel_axis(node: fx.Node) -> fx.Node:
    """Undo the views that add the axis of the frequencies to the positions."""
    while isinstance(source := node.args[0] if node.args else None, fx.Node):
        grown = op_name(node) in ("repeat", "expand") and _is_column(source)
        cast = op_name(node) in CASTS and _is_integer(source)
        if not (grown or cast or _adds_inner_axis(node)):
            break
        node = source
    return node


def _is_column(node: fx.Node) -> bool:
    shape = shape_of(node) or ()
    return len(shape) > 2 and isinstance(shape[-1], int) and shape[-1] == 1


def _adds_inner_axis(node: fx.Node) -> bool:
    """Tell whether ``node`` has one more axis, not in front of the others."""
    if op_name(node) == "unsqueeze":
        return argument(node, 1, "dim") != 0
    index = argument(node, 1, "index")
    if op_name(node) != "getitem" or not isinstance(index, tuple):
        return False
    views = all(i is None or i is Ellipsis or i == slice(None) for i in index)
    return views and index[0] is not None and None in index


def _origin(node: fx.Node) -> str:
    """Follow the positions through views and shifts to where they begin."""
    current: Any = node
    for _ in range(_MAX_NODES):
        name = op_name(current)
        if current.op == "placeholder" or name == "arange":
            return "input" if current.op == "placeholder" else "arange"
        tensors = [n for n in current.all_input_nodes if len(shape_of(n) or ()) > 0]
        steps = (*CASTS, *_VIEWS, "getitem", "add", "sub", "add_", "iadd")
        if name not in steps or len(tensors) != 1:
            break
        current = tensors[0]
    return "computed"
