"""The solver of readings: nothing possible is dropped, equations are arc consistent."""

from __future__ import annotations

from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt.ir.sizes.readings import NoReadingError, Readings


@st.composite
def equations(draw):
    sizes = draw(st.lists(st.integers(1, 3), min_size=1, max_size=5))
    tables = []
    for _ in range(draw(st.integers(0, 4))):
        members = draw(
            st.lists(
                st.integers(0, len(sizes) - 1), min_size=1, max_size=3, unique=True
            )
        )
        rows = list(product(*(range(sizes[m]) for m in members)))
        tables.append((tuple(members), draw(st.sets(st.sampled_from(rows)))))
    return sizes, tables


def solutions(sizes, tables):
    return {
        row
        for row in product(*map(range, sizes))
        if all(tuple(row[m] for m in members) in rows for members, rows in tables)
    }


@given(equations())
def test_no_solution_is_lost(drawn):
    sizes, tables = drawn
    true = solutions(sizes, tables)
    solver = Readings()
    unknowns = [solver.add(size) for size in sizes]
    try:
        for members, rows in tables:
            solver.require(members, rows)
    except NoReadingError:
        assert not true
        return
    for unknown in unknowns:
        assert {row[unknown] for row in true} <= set(solver.domain(unknown))
    assert set(solver.combinations(unknowns)) == true


def test_an_equation_narrows_through_others():
    solver = Readings()
    a, b, c = (solver.add(2) for _ in range(3))
    solver.require((a, b), [(0, 0), (1, 1)])
    solver.require((b, c), [(0, 0), (1, 1)])
    assert solver.only(a) is None
    solver.require((c,), [(1,)])
    assert [solver.only(u) for u in (a, b, c)] == [1, 1, 1]


def test_too_many_combinations_are_refused():
    solver = Readings()
    unknowns = [solver.add(3) for _ in range(7)]
    with pytest.raises(NoReadingError, match="too many"):
        solver.combinations(unknowns)
