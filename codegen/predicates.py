"""Which keys a query sees: predicates over (query, key), and loop bounds from them.

A pattern is a sympy Boolean over the absolute positions ``Q`` and ``K`` and the
parameters ``SINK`` and ``WINDOW``. Everything else is derived: the key intervals that a
block of query rows must visit, the part of them that needs no element mask, and the
number of visited pairs (Jiang et al. 2024, MInference, A-shape; Yang et al. 2025,
LServe, streaming; Beltagy et al. 2020, sliding window).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, reduce
from typing import Any

import sympy
from sympy import And, Ge, Gt, Le, Lt, Max, Min, Not, Or, floor, true

Q, K, SINK, WINDOW = sympy.symbols("q k sink window", integer=True)
Q_FIRST, Q_LAST = sympy.symbols("q_first q_last", integer=True)

# Streaming heads round to blocks of this many tokens (LServe's page).
BLOCK = 64

_PAST = Le(K, Q)
_PATTERNS: dict[str, Any] = {
    "full": true,
    "causal": _PAST,
    "sliding-window": And(_PAST, Gt(K, Q - WINDOW)),
    "a-shape": And(_PAST, Or(Lt(K, SINK), Gt(K, Q - WINDOW))),
    "streaming": And(
        _PAST,
        Or(Lt(K, SINK), Gt(floor(K / BLOCK), floor(Q / BLOCK) - WINDOW / BLOCK)),
    ),
}
PATTERNS = tuple(_PATTERNS)


@dataclass(frozen=True)
class Predicate:
    """A pattern: ``expr`` is true where query Q sees key K."""

    name: str
    expr: Any

    @property
    def parameters(self) -> tuple[sympy.Symbol, ...]:
        """Return which of SINK and WINDOW the pattern uses."""
        return tuple(s for s in (SINK, WINDOW) if s in self.expr.free_symbols)


@dataclass(frozen=True)
class KeyRun:
    """Keys [begin, end) to visit for query rows Q_FIRST..Q_LAST (inclusive).

    Keys in [full_begin, full_end) are seen by every row of the block, so tiles inside
    need no element mask. ``end`` None means up to the last key. Bounds may leave
    [0, kv_len] or cross (an empty run); the caller clips.
    """

    begin: Any
    end: Any
    full_begin: Any
    full_end: Any


@dataclass(frozen=True)
class _Interval:
    """Keys [lower, upper) that one query Q sees through one disjunct; None is open."""

    lower: Any
    upper: Any


@cache
def predicate(pattern: str) -> Predicate:
    """Return the predicate of ``pattern``; KeyError for a name not in `PATTERNS`."""
    return Predicate(pattern, _PATTERNS[pattern])


@cache
def intervals(pred: Predicate) -> tuple[_Interval, ...]:
    """Return the key intervals of one query row, ascending, by solving every atom."""
    normal = sympy.to_dnf(pred.expr)
    parts = normal.args if isinstance(normal, Or) else (normal,)
    found = [_conjunction(part) for part in parts]
    return tuple(sorted(found, key=lambda i: i.lower is not None))


def _conjunction(part: Any) -> _Interval:
    atoms = part.args if isinstance(part, And) else (() if part == true else (part,))
    lowers, uppers = [], []
    for atom in atoms:
        lower, upper = _solve(atom)
        lowers += [] if lower is None else [lower]
        uppers += [] if upper is None else [upper]
    return _Interval(
        reduce(Max, lowers) if lowers else None, reduce(Min, uppers) if uppers else None
    )


def _solve(atom: Any) -> tuple[Any, Any]:
    """Return (lower, upper) of K for one comparison; half-open, integers."""
    if isinstance(atom, Not):
        atom = atom.args[0].negated
    left, right, strict = atom.lhs, atom.rhs, isinstance(atom, (Lt, Gt))
    less = isinstance(atom, (Lt, Le))
    if right.has(K):
        left, right, less = right, left, not less
    if not isinstance(atom, (Lt, Le, Gt, Ge)) or right.has(K):
        raise ValueError(f"cannot bound the key in {atom}")
    scale = 1
    if isinstance(left, floor) and left.args[0] == K / BLOCK:
        left, scale = K, BLOCK
    if left != K:
        raise ValueError(f"cannot bound the key in {atom}")
    if less:
        return None, scale * (right if strict else right + 1)
    return scale * (right + 1 if strict else right), None


@cache
def key_runs(pred: Predicate) -> tuple[KeyRun, ...]:
    """Return the disjoint, ascending runs of keys for a block of query rows.

    Every bound must not fall as Q grows, so its extremes lie at the block's ends: a
    block visits from the first row's lower bound to the last row's upper bound, and all
    rows share what lies between the last row's lower and the first row's upper.
    """
    runs: list[KeyRun] = []
    for interval in intervals(pred):
        _require_monotone(interval)
        begin = _at(interval.lower, Q_FIRST, sympy.Integer(0))
        full_begin = _at(interval.lower, Q_LAST, sympy.Integer(0))
        if runs:
            begin = Max(begin, runs[-1].end)
        runs.append(
            KeyRun(
                begin,
                _at(interval.upper, Q_LAST, None),
                full_begin,
                _at(interval.upper, Q_FIRST, None),
            )
        )
    return tuple(runs)


def _at(bound: Any, row: sympy.Symbol, missing: Any) -> Any:
    return missing if bound is None else bound.subs(Q, row)


def _require_monotone(interval: _Interval) -> None:
    for bound in (interval.lower, interval.upper):
        smooth = sympy.Integer(0) if bound is None else bound.replace(floor, _identity)
        for part in smooth.args if isinstance(smooth, (Min, Max)) else (smooth,):
            slope = sympy.diff(part, Q)
            if not slope.is_number or slope < 0:
                raise ValueError(f"the bound {bound} falls as the query moves on")


def _identity(value: Any) -> Any:
    return value


def row_keys(pred: Predicate, kv_len: Any) -> Any:
    """Return the number of keys that one query Q sees, as a sympy expression."""
    total: Any = sympy.Integer(0)
    previous: Any = None
    for interval in intervals(pred):
        begin = interval.lower if interval.lower is not None else sympy.Integer(0)
        begin = Max(begin, 0)
        if previous is not None:
            begin = Max(begin, previous)
        end = kv_len if interval.upper is None else Min(interval.upper, kv_len)
        total += Max(end - begin, 0)
        previous = end
    return total


def count_pairs(
    pattern: str,
    query_len: int,
    kv_len: int,
    offset: int = 0,
    sink: int = 0,
    window: int = 0,
) -> int:
    """Return the exact number of visible (query, key) pairs for numbers."""
    keys = row_keys(predicate(pattern), sympy.Integer(kv_len))
    count = sympy.lambdify((Q, SINK, WINDOW), keys, modules=_INTEGERS)
    return sum(int(count(row + offset, sink, window)) for row in range(query_len))


_INTEGERS = [{"Max": max, "Min": min, "floor": lambda x: int(x // 1)}, "math"]


def visited_pairs(pred: Predicate, query_len: Any, kv_len: Any, offset: Any) -> Any:
    """Return the visible pairs in closed form, for the cost model.

    Row counts are piecewise linear in Q (floors are taken as exact divisions, an error
    below one block a row), so the sum over rows is that of clipped ramps.
    """
    query_len, kv_len, offset = map(sympy.sympify, (query_len, kv_len, offset))
    total: Any = sympy.Integer(0)
    previous_upper: Any = None
    for interval in intervals(pred):
        upper = kv_len if interval.upper is None else interval.upper
        total += _clipped_sum(upper, query_len, kv_len, offset)
        lower = interval.lower
        if lower is not None:
            total -= _clipped_sum(lower, query_len, kv_len, offset)
        if previous_upper is not None and lower is not None:
            both = Min(previous_upper, upper)
            total -= _clipped_sum(both, query_len, kv_len, offset)
            total += _clipped_sum(Min(both, lower), query_len, kv_len, offset)
        previous_upper = upper
    return total


def _clipped_sum(bound: Any, rows: Any, kv_len: Any, offset: Any) -> Any:
    """Sum over rows r of clip(bound(Q = r + offset), 0, kv_len).

    A bound is a minimum and maximum of ramps ``Q + c`` and constants; minima of ramps
    are folded into one ramp and one constant before the sum is taken.
    """
    bound = bound.replace(floor, _identity)
    if isinstance(bound, Max):
        # max(a, b) = a + b - min(a, b), term by term.
        first, rest = bound.args[0], Max(*bound.args[1:])
        return (
            _clipped_sum(first, rows, kv_len, offset)
            + _clipped_sum(rest, rows, kv_len, offset)
            - _clipped_sum(Min(first, rest), rows, kv_len, offset)
        )
    parts = bound.args if isinstance(bound, Min) else (bound,)
    ramps = [p - Q for p in parts if p.has(Q)]
    caps = [p for p in parts if not p.has(Q)]
    cap = Min(kv_len, *caps)
    if not ramps:
        return rows * Max(cap, 0)
    return _ramp_sum(rows, offset + Min(*ramps), Max(cap, 0))


def _ramp_sum(rows: Any, start: Any, cap: Any) -> Any:
    """Sum over r in [0, rows) of clip(r + start, 0, cap)."""

    def triangle(x: Any) -> Any:
        x = Max(x, 0)
        return x * (x - 1) / 2

    # Sum of max(r + start, 0) minus what lies above the cap.
    end = start + rows
    above = triangle(end - cap) - triangle(start - cap)
    return triangle(end) - triangle(Max(start, 0)) - above
