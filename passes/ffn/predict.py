"""Predicted FLOPs and bytes of an FFN in a decoding step, symbolic in the batch."""

from __future__ import annotations

from math import prod

import sympy

from graphopt.cost import BATCH, Cost
from graphopt.ir.match import shape_of, size_expr, value_of
from graphopt.passes.ffn.held import Held


def dense_step(held: Held) -> Cost:
    """Return the cost of all neurons: 2 FLOPs a weight and row, every weight once."""
    weights = sum(prod(map(int, shape)) for shape in _shapes(held))
    return Cost(2 * BATCH * weights, sympy.Integer(weights * _itemsize(held)))


def kept_step(held: Held) -> Cost:
    """Return the cost of the kept neurons; rows that choose read their own weights."""
    dense, neurons = dense_step(held), int(size_expr(held.layer.ffn[0].neurons))
    share = sympy.Rational(held.kept, neurons)
    return Cost(dense.flops * share, dense.bytes * share * choices(held))


def choices(held: Held) -> sympy.Expr:
    """Return how many rows choose for themselves: 1, a number, or the batch."""
    rows = size_expr((shape_of(held.indices) or ())[0])
    return rows if rows.is_number else BATCH


def buffer_bytes(held: Held) -> sympy.Expr:
    """Return the bytes that a layer's buffers, counts and indices take."""
    neurons = int(size_expr(held.layer.ffn[0].neurons))
    own = 4 * neurons + 8 * held.kept
    return kept_step(held).bytes + choices(held) * own


def _shapes(held: Held) -> list[tuple[int, ...]]:
    found = held.projections(held.layer.ffn[0])
    return [shape_of(projection.weight) or () for projection in found]


def _itemsize(held: Held) -> int:
    weight = held.projections(held.layer.ffn[0])[0].weight
    return int(value_of(weight).itemsize)
