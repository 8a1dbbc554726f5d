"""Attention in float64 with a mask written out by hand: what kernels must equal."""

from __future__ import annotations

import torch

TOLERANCE = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}


def visible(pattern, sink, window, queries, keys, offset):
    """The mask written out element by element, [queries, keys]."""
    q = torch.arange(queries)[:, None] + offset
    k = torch.arange(keys)[None]
    past = k <= q
    if pattern == "full":
        return torch.ones(queries, keys, dtype=torch.bool)
    if pattern == "causal":
        return past
    if pattern == "sliding-window":
        return past & (q - k < window)
    if pattern == "a-shape":
        return past & ((k < sink) | (q - k < window))
    return past & ((k < sink) | (q // 64 - k // 64 < window // 64))


def oracle(q, k, v, mask, scale, softcap=0.0):
    """Attention in float64; ``mask`` broadcasts to [B, Hq, Sq, Skv]."""
    group = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double(), v.double()
    k, v = (t.repeat_interleave(group, 1) for t in (k, v))
    scores = q @ k.mT * scale
    if softcap:
        scores = softcap * (scores / softcap).tanh()
    weights = scores.masked_fill(~mask, float("-inf")).softmax(-1)
    return weights.nan_to_num(0.0) @ v


def tensors(heads, kv_heads, queries, keys, dim, dtype=torch.float32, batch=1, seed=0):
    """Random query, key and value."""
    torch.manual_seed(seed)
    q = torch.randn(batch, heads, queries, dim)
    k, v = (torch.randn(batch, kv_heads, keys, dim) for _ in range(2))
    return tuple(t.to(dtype) for t in (q, k, v))


def assert_close(actual, expected, dtype):
    limit = TOLERANCE[dtype]
    torch.testing.assert_close(actual.double(), expected, atol=limit, rtol=limit)
