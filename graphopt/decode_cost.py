"""Predicted FLOPs and bytes of the attention of one decoding step.

`TOKENS` is the context here, the tokens in the cache. A step is bound by memory, so
bytes predict its time.
"""

from __future__ import annotations

import sympy

from graphopt.codegen.pages import LOGICAL, PAGE
from graphopt.cost import BATCH, TOKENS, AttentionShape, Cost

_COPY = 3  # a cache that is copied out is read, written, and read again


def dense_step(shape: AttentionShape, copied: bool) -> Cost:
    """Return the cost of attending to every token; ``copied``: to a copy of them."""
    bytes_read = _kv_bytes(shape, TOKENS) * (_COPY if copied else 1)
    return Cost(_flops(shape, TOKENS), bytes_read)


def pages_step(shape: AttentionShape, budget: int, interval: int) -> Cost:
    """Return the cost of ``budget`` pages, chosen again every ``interval`` tokens.

    A choice reads two keys, the smallest and the largest, of every `LOGICAL` tokens;
    while the budget covers the context nothing is judged.
    """
    seen = sympy.Min(TOKENS, budget * PAGE)
    judged = sympy.Piecewise((TOKENS, budget * PAGE < TOKENS), (0, True))
    judged = judged / (LOGICAL * interval)
    flops = _flops(shape, seen) + 4 * BATCH * shape.num_heads * shape.head_dim * judged
    return Cost(flops, _kv_bytes(shape, seen) + _kv_bytes(shape, judged))


def places_step(shape: AttentionShape, seen: int) -> Cost:
    """Return the cost of attending from one token to ``seen`` chosen ones.

    They are copied out; tokens that come back to join a step depend on the text.
    """
    seen = sympy.Integer(seen)
    return Cost(_flops(shape, seen), _COPY * _kv_bytes(shape, seen))


def ring_step(shape: AttentionShape, pages: int) -> Cost:
    """Return the cost of heads that read a ring of ``pages`` pages."""
    seen = sympy.Min(TOKENS, pages * PAGE)
    return Cost(_flops(shape, seen), _kv_bytes(shape, seen))


def _flops(shape: AttentionShape, tokens: sympy.Expr) -> sympy.Expr:
    return 4 * BATCH * shape.num_heads * shape.head_dim * tokens


def _kv_bytes(shape: AttentionShape, tokens: sympy.Expr) -> sympy.Expr:
    return 2 * BATCH * shape.num_kv_heads * shape.head_dim * shape.itemsize * tokens
