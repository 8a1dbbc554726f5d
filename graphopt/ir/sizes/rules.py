"""What sizes must keep to beside what an operator checks: tokens are not scrambled."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from operator import mul
from typing import Any

import torch
from torch import fx

from graphopt.ir.match import op_name

_RESHAPES = ("reshape", "flatten", "unflatten")


def is_reshape(node: fx.Node) -> bool:
    """Tell whether ``node`` gives the elements of its input other sizes."""
    return op_name(node) in _RESHAPES


def aligned(source: Sequence[int], result: Sequence[int]) -> bool:
    """Tell whether a reshape only merges and splits whole axes.

    ``[2, T, 64]`` to ``[2, T, 4, 16]`` does; to ``[2, 64, T]`` it would deal out the
    elements of one token among others. With trial counts that are coprime to all other
    sizes it shows in numbers: the strides of both shapes divide one another.
    """
    if 0 in source or 0 in result:
        return True
    strides = sorted({*_strides(source), *_strides(result)})
    return all(larger % smaller == 0 for smaller, larger in pairwise(strides))


def _strides(sizes: Sequence[int]) -> list[int]:
    return list(accumulate(reversed(sizes), mul, initial=1))


def sliced_axis(node: fx.Node, leaf: int, rank: int) -> int | None:
    """Return the axis of ``node.args[0]`` that leaf ``leaf`` of a slice bounds.

    None when the leaf bounds no slice, or an index tensor hides which axis it is.
    """
    if op_name(node) != "getitem" or len(node.args) != 2:
        return None
    index: Any = node.args[1]
    items = list(index) if isinstance(index, tuple) else [index]
    if any(isinstance(item, (fx.Node, torch.Tensor, list)) for item in items):
        return None
    taken = sum(item is not None and item is not Ellipsis for item in items)
    axis, place = 0, 1
    for item in items:
        width = 3 if isinstance(item, slice) else 1
        if place <= leaf < place + width:
            return axis if isinstance(item, slice) else None
        place += width
        axis += rank - taken if item is Ellipsis else int(item is not None)
    return None
