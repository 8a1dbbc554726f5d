"""Predicted FLOPs and bytes of an FFN in a decoding step, symbolic in the batch."""

from __future__ import annotations

from math import prod

import sympy

from graphopt.cost import BATCH, Cost
from graphopt.ir.match import shape_of, size_expr, value_of
from graphopt.passes.ffn.held import Held
from graphopt.passes.ffn.projection import Projection


def dense_step(held: Held) -> Cost:
    """Return the cost of all neurons: 2 FLOPs a weight and row, every weight once."""
    weights = sum(prod(map(int, shape)) for shape in _shapes(held))
    return Cost(2 * BATCH * weights, sympy.Integer(weights * _itemsize(held)))


def kept_step(held: Held, skips: bool) -> Cost:
    """Return the cost of the kept neurons; rows that choose read their own weights.

    Of neurons that ranks share out a rank has its part on average. ``skips``: what is
    not filled of one choice's float buffers is not read.
    """
    share = sympy.Rational(held.kept, held.neurons)
    filled = sympy.Rational(held.kept, held.room * held.share.ranks)
    skips = skips and choices(held) == 1 and not held.scales
    read = _all_buffers(held) * (filled if skips else 1)
    return Cost(dense_step(held).flops * share, read * choices(held))


def choices(held: Held) -> sympy.Expr:
    """Return how many rows choose for themselves: 1, a number, or the batch."""
    rows = size_expr((shape_of(held.indices) or ())[0])
    return rows if rows.is_number else BATCH


def buffer_bytes(held: Held) -> sympy.Expr:
    """Return the bytes that a layer's buffers, counts and indices take."""
    own = 4 * held.neurons + 8 * held.kept
    return choices(held) * (_all_buffers(held) + own)


def _shapes(held: Held) -> list[tuple[int, ...]]:
    found = held.projections(held.layer.ffn[0])
    return [shape_of(projection.weight) or () for projection in found]


def _all_buffers(held: Held) -> sympy.Integer:
    found = held.projections(held.layer.ffn[0])
    return sympy.Integer(sum(map(_buffer_bytes, found)))


def _buffer_bytes(projection: Projection) -> int:
    """Return the bytes of one choice's weights, and of their scales if they are codes.

    ``projection`` has a buffer.
    """
    outputs, inputs = (int(n) for n in (shape_of(projection.buffer) or ())[-2:])
    size = int(value_of(projection.buffer).itemsize)
    return outputs * (size * inputs + (0 if projection.scales is None else 4))


def _itemsize(held: Held) -> int:
    weight = held.projections(held.layer.ffn[0])[0].weight
    return int(value_of(weight).itemsize)
