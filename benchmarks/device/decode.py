"""One decoding step of a layer over pages, at Llama-3-8B's shapes in bfloat16.

``graphopt`` chooses and reads a budget of pages at every step, ``kept`` reads a choice
that still holds (three steps of four at the default interval), ``every_page`` is the
same kernel over all pages: dense paged decoding. ``cudnn`` and ``flash`` are SDPA over
keys and values that lie end to end, and ``append`` the write of one token.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.attention import sdpa_kernel

from benchmarks.device.attention import BACKENDS, DIM, HEADS, KV_HEADS
from benchmarks.device.timing import DEVICE, Row, Run, compare, row
from graphopt.ops.pages import LOGICAL, PAGE

BUDGET = 4096 // PAGE  # pages: LServe's budget of 4096 tokens
ALWAYS, FOUR = 0, 4  # tokens that a choice is kept for


@torch.no_grad()
def decode_row(tokens: int, notes: list[str]) -> Row:
    """Compare the sides with ``tokens`` tokens in the cache, the new one among them."""
    torch.manual_seed(0)
    pages = -(-tokens // PAGE)
    layer = _layer(pages, tokens)
    query = _random(1, HEADS, 1, DIM)
    new = [_random(1, KV_HEADS, 1, DIM) for _ in range(2)]
    append = torch.ops.graphopt.append_pages
    held, statistics = layer["held"], layer["state"][0]
    sides: dict[str, Run] = {
        "graphopt": _attend(layer, query, BUDGET, ALWAYS),
        "kept": _attend(layer, query, BUDGET, FOUR),
        "every_page": _attend(layer, query, pages, FOUR),
        "append": partial(append, *new, held[13], held[4], *held[:4], statistics),
    }
    key, value = (_random(1, KV_HEADS, tokens, DIM) for _ in range(2))
    for name, backend in BACKENDS.items():
        sides[name] = partial(_dense, backend, query, key, value)
    times = compare(sides, f"decode at {tokens} tokens", notes)
    others = {n: times[n] for n in ("kept", "every_page", "append")}
    rounded = {f"{n}_ms": t and round(t, 4) for n, t in others.items()}
    return row("decode", f"{BUDGET} pages", tokens, times) | rounded


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, device=DEVICE, dtype=torch.bfloat16)


def _layer(pages: int, tokens: int) -> dict[str, Any]:
    """Return pages in random order, the last of them with room for one token."""
    table = torch.randperm(pages, device=DEVICE, dtype=torch.int32)[None]
    past = torch.tensor([tokens - 1], device=DEVICE, dtype=torch.int32)
    pools = [_random(KV_HEADS, pages, PAGE, DIM) for _ in range(2)]
    parts = pools[0].unflatten(2, (PAGE // LOGICAL, LOGICAL))
    statistics = torch.stack((parts.amin(3), parts.amax(3)), 3)
    held = (*pools, None, None, table, *(None,) * 5, [], 0, 0, past, 1)
    return {"held": held, "state": (statistics,)}


def _attend(
    layer: dict[str, Any], query: torch.Tensor, budget: int, interval: int
) -> Run:
    """Return a side with a choice of its own, which others do not make older."""
    held, pages = layer["held"], layer["held"][4].shape[1]
    selected = torch.full((1, KV_HEADS, pages), -1, dtype=torch.int32, device=DEVICE)
    at = selected[..., 0].clone()
    attend = torch.ops.graphopt.page_attention
    rest = (*layer["state"], selected, at, None, budget, interval)
    return partial(attend, query, *held, *rest)


def _dense(
    backend: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> torch.Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
