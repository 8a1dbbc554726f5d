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

# Share of the causal pairs that antidiagonal heads visit at a threshold of 0.9, by
# prompt length: the greater of strides 8 and 16 in XAttention's table 5 (Xu et al.
# 2025). Lengths between two entries count as the shorter; under the first is dense.
_DENSITY = {
    4096: 0.55,
    8192: 0.44,
    16384: 0.289,
    32768: 0.279,
    65536: 0.113,
    131072: 0.073,
}


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
    blocks: int = 0,
    stride: int = 0,
    threshold: float = 0.9,
) -> Cost:
    """Return the cost of prefill attention: 4 FLOPs per visited pair and channel.

    ``vertical`` and what follows are those of the pattern ``visit-list``.
    """
    if pattern == "visit-list":
        pairs = visit_pairs(sink, window, vertical, slash, blocks, stride, threshold)
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
    sink: int,
    window: int,
    vertical: int,
    slash: int,
    device: str,
    blocks: int = 0,
    stride: int = 0,
    threshold: float = 0.9,
) -> int:
    """Return the same for a head of visit lists, its selection counted in."""
    pairs = visit_pairs(sink, window, vertical, slash, blocks, stride, threshold)
    return _pays_from(pairs, device)


def visit_pairs(
    sink: int,
    window: int,
    vertical: int,
    slash: int,
    blocks: int = 0,
    stride: int = 0,
    threshold: float = 0.9,
) -> sympy.Expr:
    """Predict the pairs that visit lists visit and that their selection scores.

    How slashes merge depends on the prompt: `_SLASH_KEYS` is what one was seen to cost
    a row beyond its neighbours. The last 64 queries are scored against all keys. A head
    with ``blocks`` or ``stride`` visits a block list instead; scoring is one product of
    two, and half a pair.
    """
    if stride:
        causal, density = _pairs("causal", 0, 0), _antidiagonal_density(threshold)
        return density * causal + causal / (2 * stride)
    if blocks:
        seen = _pairs("sliding-window", 0, blocks * BLOCK - BLOCK // 2)
        return seen + _pairs("causal", 0, 0) / (2 * BLOCK**2)
    seen = sink + window + BLOCK // 2 + vertical + _SLASH_KEYS * slash
    scored = 2 * BLOCK * TOKENS if vertical or slash else 0
    return _pairs("sliding-window", 0, seen) + scored


def _antidiagonal_density(threshold: float) -> Any:
    """Return the expected share of causal pairs; thresholds under 1 count as 0.9."""
    if threshold >= 1.0:
        return sympy.Integer(1)
    lengths, shares = zip(*_DENSITY.items(), strict=True)
    limits = [sympy.Lt(TOKENS, length) for length in lengths]
    return sympy.Piecewise(*zip((1.0, *shares), (*limits, True), strict=True))


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
