"""Chains of reshapes with literal sizes: the true meaning of each literal survives."""

from __future__ import annotations

from itertools import groupby
from math import prod

import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sympy import sympify
from torch import fx

from graphopt.ir.sizes.equations import SizeEquations
from graphopt.ir.sizes.literals import literal_readings
from graphopt.ir.sizes.slots import TOKENS, LiteralReadings
from graphopt.ir.sizes.token_counts import polynomial, trial_counts


@st.composite
def chains(draw):
    """Axes [B, T, heads, D], merged in a few ways one after another; one may be -1."""
    batch, heads, width = (draw(st.integers(1, 6)) for _ in range(3))
    axes = (batch, TOKENS, heads, draw(st.sampled_from([width, 16, 64])))
    steps = []
    for _ in range(draw(st.integers(1, 4))):
        joins = draw(st.tuples(*[st.booleans()] * 3))
        group = [0]
        for join in joins:
            group.append(group[-1] + (not join))
        grouped = groupby(zip(group, axes, strict=True), key=lambda pair: pair[0])
        sizes = [prod(axis for _, axis in members) for _, members in grouped]
        steps.append((sizes, draw(st.integers(-1, len(sizes) - 1))))
    return axes, draw(st.integers(3, 70)), steps


def at(size, tokens):
    return int(sympify(size).subs(TOKENS, tokens))


def solved(axes, tokens, steps):
    """Return the equations of the chain, and the true size behind each literal."""
    taken = {tokens, *(at(size, tokens) for sizes, _ in steps for size in sizes)}
    counts = trial_counts(tokens, taken)
    literals, equations = LiteralReadings(tokens, counts), SizeEquations(len(counts))
    graph, true = fx.Graph(), {}
    node = graph.placeholder("x")
    like = torch.empty(0)
    shapes = [tuple(at(axis, count) for axis in axes) for count in counts]
    equations.know(node, [equations.runs.tensor(like, shape) for shape in shapes])
    for sizes, hidden in steps:
        given_ = [at(size, tokens) for size in sizes]
        if hidden >= 0:
            given_[hidden] = -1
        node = graph.call_method("reshape", (node, *given_))
        equations.visit(node, literal_readings(node, literals))
        true |= {(node, place + 1): size for place, size in enumerate(sizes)}
    return equations, true, (tokens, counts, node)


# Four tokens, of which 16 may be the square or four times as many.
AMBIGUOUS = [([1, 32 * TOKENS], 0), ([1, TOKENS, 2, 16], 0), ([1, 2 * TOKENS, 16], 0)]


@settings(deadline=None, max_examples=60)
@given(chains())
@example(((1, TOKENS, 2, 16), 4, AMBIGUOUS))
def test_the_true_reading_is_never_dropped(drawn):
    equations, true, _ = solved(*drawn)
    for number, unknown in enumerate(equations.unknowns):
        size = true[unknown.node, unknown.leaf]
        assert size in [reading.expr for reading in equations.possible(number)]


@settings(deadline=None, max_examples=40)
@given(chains())
def test_a_prime_number_of_tokens_is_always_told_apart(drawn):
    axes, _, steps = drawn
    equations, true, (tokens, counts, last) = solved(axes, 67, steps)
    for number, unknown in enumerate(equations.unknowns):
        assert equations.reading(number).expr == true[unknown.node, unknown.leaf]
    values = equations.values(last)
    assert values.unknowns == ()
    sizes = zip(*(value.shape for value in values.rows[()]), strict=True)
    wanted = [(at(size, tokens), size) for size in steps[-1][0]]
    for (traced, size), found in zip(wanted, sizes, strict=True):
        assert polynomial((tokens, *counts), (traced, *found)) == size


def test_sizes_that_are_no_polynomial():
    assert polynomial((20, 17, 13, 23), (10, 9, 7, 12)) is None
    assert polynomial((20, 17, 13, 23), (400, 289, 169, 529)) == TOKENS**2
    assert polynomial((20, 17, 13, 23), (400, 289, 169, 530)) is None
