"""Predicted FLOPs, bytes and time of attention, symbolic in batch and tokens."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import sympy

from graphopt.codegen.predicates import BLOCK, predicate, visited_pairs

BATCH, TOKENS = sympy.symbols("batch tokens", integer=True, positive=True)

# Rate per visited FLOP over that of the device's dense causal kernel, rounded down from
# benchmarks/attention.py, and the shortest prompt that is worth a launch's set-up.
_RELATIVE_RATE = {"cpu": 0.75, "cuda": 0.5}
_SHORTEST = {"cpu": 512, "cuda": 4096}
_SLASH_KEYS = 1


@dataclass(frozen=True)
class Cost:
    """``flops`` of both products, ``bytes`` of reading q, k, v and writing out."""

    flops: sympy.Expr
    bytes: sympy.Expr

    def at(self, batch: int, tokens: int) -> tuple[float, float]:
        """Return (FLOPs, bytes) for numbers."""
        values = {BATCH: batch, TOKENS: tokens}
        return float(self.flops.subs(values)), float(self.bytes.subs(values))


@dataclass(frozen=True)
class AttentionShape:
    """What the cost of an attention depends on beside batch and tokens."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    itemsize: int


def attention_cost(
    shape: AttentionShape,
    pattern: str,
    sink: int = 0,
    window: int = 0,
    vertical: int = 0,
    slash: int = 0,
) -> Cost:
    """Return the cost of prefill attention: 4 FLOPs per visited pair and channel.

    ``vertical`` and ``slash`` are those of the pattern ``visit-list``.
    """
    if pattern == "visit-list":
        pairs = visit_pairs(sink, window, vertical, slash)
    else:
        pairs = _pairs(pattern, sink, window)
    flops = 4 * BATCH * shape.num_heads * shape.head_dim * pairs
    rows = 2 * shape.num_heads + 2 * shape.num_kv_heads
    return Cost(flops, BATCH * TOKENS * rows * shape.head_dim * shape.itemsize)


@cache
def _pairs(pattern: str, sink: int, window: int) -> sympy.Expr:
    from graphopt.codegen.predicates import SINK, WINDOW

    expression = visited_pairs(predicate(pattern), TOKENS, TOKENS, sympy.Integer(0))
    return expression.subs({SINK: sink, WINDOW: window})


@cache
def pays_from(pattern: str, sink: int, window: int, device: str) -> int:
    """Return the shortest prompt, in tokens, for which the pattern is predicted faster.

    Predicted time is visited pairs over the kernel's relative rate; below the number
    the dense causal kernel is faster.
    """
    return _pays_from(_pairs(pattern, sink, window), device)


@cache
def visit_pays_from(
    sink: int, window: int, vertical: int, slash: int, device: str
) -> int:
    """Return the same for a vertical-slash head, its selection counted in."""
    return _pays_from(visit_pairs(sink, window, vertical, slash), device)


def visit_pairs(sink: int, window: int, vertical: int, slash: int) -> sympy.Expr:
    """Predict the pairs that visit lists visit and that their selection scores.

    How slashes merge depends on the prompt: `_SLASH_KEYS` is what one was seen to cost
    a row beyond its neighbours. The last 64 queries are scored against all keys.
    """
    seen = sink + window + BLOCK // 2 + vertical + _SLASH_KEYS * slash
    scored = 2 * BLOCK * TOKENS if vertical or slash else 0
    return _pairs("sliding-window", 0, seen) + scored


def _pays_from(sparse: sympy.Expr, device: str) -> int:
    """Search for the number: double, then bisect."""
    rate = _RELATIVE_RATE.get(device, min(_RELATIVE_RATE.values()))
    dense = _pairs("causal", 0, 0)

    def pays(tokens: int) -> bool:
        value: Any = (sparse / rate).subs(TOKENS, tokens)
        return bool(value < dense.subs(TOKENS, tokens))

    low = _SHORTEST.get(device, max(_SHORTEST.values()))
    if pays(low):
        return low
    high = 2 * low
    while not pays(high):
        low, high = high, 2 * high
        if high > 1 << 40:
            return high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if pays(middle) else (middle, high)
    return high
