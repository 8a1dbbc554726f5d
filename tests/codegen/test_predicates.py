"""Loop bounds and counts derived from predicates, against brute force."""

from __future__ import annotations

import pytest
import sympy
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.codegen.predicates import (
    BLOCK,
    PATTERNS,
    Q_FIRST,
    Q_LAST,
    SINK,
    WINDOW,
    K,
    Q,
    count_pairs,
    key_runs,
    predicate,
    visited_pairs,
)
from graphopt.codegen.printers import to_cpp, to_triton
from graphopt.ops.reference import visible_keys

blocks = st.integers(1, 4).map(lambda n: n * BLOCK)


def _seen(pattern, sink, window, queries, keys, offset):
    mask = visible_keys(pattern, [sink], [window], queries, keys, offset)[0]
    return [{k for k in range(keys) if mask[q, k]} for q in range(queries)]


def _bounds(run, first, last, sink, window, keys):
    values = {Q_FIRST: first, Q_LAST: last, SINK: sink, WINDOW: window}
    ends = (run.begin, run.end, run.full_begin, run.full_end)
    numbers = [keys if e is None else int(sympy.sympify(e).subs(values)) for e in ends]
    return [min(max(n, 0), keys) for n in numbers]


@pytest.mark.parametrize("pattern", PATTERNS)
@settings(max_examples=25, deadline=None)
@given(sink=blocks, window=blocks, rows=st.integers(1, 70), first=st.integers(0, 300))
def test_runs_cover_what_a_block_of_rows_sees(pattern, sink, window, rows, first):
    keys = first + rows
    seen = _seen(pattern, sink, window, rows, keys, first)
    visited, everywhere = [], set()
    for run in key_runs(predicate(pattern)):
        numbers = _bounds(run, first, keys - 1, sink, window, keys)
        begin, end, full_begin, full_end = numbers
        visited += range(begin, end)
        everywhere |= set(range(max(begin, full_begin), min(end, full_end)))
    assert len(visited) == len(set(visited)), "a key is visited twice"
    assert set().union(*seen) <= set(visited)
    assert everywhere <= set.intersection(*seen)


@pytest.mark.parametrize("pattern", PATTERNS)
@settings(max_examples=20, deadline=None)
@given(sink=blocks, window=blocks, rows=st.integers(1, 90), offset=st.integers(0, 90))
def test_exact_count(pattern, sink, window, rows, offset):
    keys = rows + offset
    seen = _seen(pattern, sink, window, rows, keys, offset)
    count = count_pairs(pattern, rows, keys, offset, sink, window)
    assert count == sum(map(len, seen))


@pytest.mark.parametrize("pattern", ["causal", "sliding-window", "a-shape"])
@settings(max_examples=25, deadline=None)
@given(sink=st.integers(0, 64), window=st.integers(1, 128), rows=st.integers(1, 300))
def test_closed_form_is_exact_without_blocks(pattern, sink, window, rows):
    formula = visited_pairs(predicate(pattern), rows, rows, 0)
    value = formula.subs({SINK: sink, WINDOW: window})
    assert value == count_pairs(pattern, rows, rows, 0, sink, window)


def test_closed_form_of_streaming_errs_by_less_than_a_block_a_row():
    formula = visited_pairs(predicate("streaming"), 1000, 1000, 0)
    value = formula.subs({SINK: 64, WINDOW: 128})
    exact = count_pairs("streaming", 1000, 1000, 0, 64, 128)
    assert abs(value - exact) < 1000 * BLOCK


@pytest.mark.parametrize(
    ("expression", "cpp", "triton"),
    [
        (Q - WINDOW + 1, "1 + q - window", "1 + q - window"),
        (sympy.floor(K / 64), "floor_div(k, 64)", "(k // 64)"),
        (sympy.Min(Q, K), "std::min<int64_t>(k, q)", "tl.minimum(k, q)"),
    ],
)
def test_printed_bounds(expression, cpp, triton):
    assert (to_cpp(expression), to_triton(expression)) == (cpp, triton)


def test_a_fraction_is_refused_by_printers():
    with pytest.raises(ValueError, match="fraction"):
        to_cpp(sympy.Rational(1, 2))


def test_unknown_pattern():
    with pytest.raises(KeyError):
        predicate("diagonal")
