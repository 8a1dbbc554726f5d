"""The op against dense attention and FlexAttention, at Llama-3-8B's shapes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.device.timing import DEVICE, Row, Run, compare, row
from graphopt.codegen.predicates import BLOCK, count_pairs
from graphopt.ops import attention

SINK, WINDOW = 128, 1024
HEADS, KV_HEADS, DIM = 32, 8, 128
BACKENDS = {
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "flash": SDPBackend.FLASH_ATTENTION,
}


@torch.no_grad()
def attention_row(pattern: str, tokens: int, notes: list[str]) -> Row:
    torch.manual_seed(0)
    shapes = ((1, heads, tokens, DIM) for heads in (HEADS, KV_HEADS, KV_HEADS))
    q, k, v = (torch.randn(s, device=DEVICE, dtype=torch.bfloat16) for s in shapes)
    own = partial(attention, q, k, v, None, pattern, [SINK], [WINDOW], 0)
    sides: dict[str, Run] = {"graphopt": own}
    sides |= {name: _prepared(_dense, b, q, k, v) for name, b in BACKENDS.items()}
    sides["flex"] = _prepared(_flex, pattern, q, k, v)
    times = compare(sides, f"{pattern} at {tokens} tokens", notes)
    found = row("attention", pattern, tokens, times)
    density = count_pairs(pattern, tokens, tokens, 0, SINK, WINDOW)
    density /= count_pairs("causal", tokens, tokens)
    rate = round(density * found["speedup"], 3) if found["speedup"] else None
    return found | {"density": round(density, 4), "rate": rate}


def _prepared(prepare: Callable[..., Run], *arguments: Any) -> Run:
    """Return a side that is prepared in its first call, where it may fail."""
    once = cache(partial(prepare, *arguments))
    return lambda: once()()


def _dense(
    backend: SDPBackend, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
) -> Run:
    def run(k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(
                q, k, v, is_causal=True, enable_gqa=k.shape[1] != q.shape[1]
            )

    try:
        run(k, v)
    except RuntimeError:
        # A backend without grouped heads gets its keys repeated, outside of the time.
        k, v = (t.repeat_interleave(HEADS // KV_HEADS, 1) for t in (k, v))
    return partial(run, k, v)


def _flex(pattern: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Run:
    def visible(b: Any, h: Any, row: Any, key: Any) -> Any:
        near = key > row - WINDOW
        if pattern == "streaming":
            near = key // BLOCK > row // BLOCK - WINDOW // BLOCK
        seen = near if pattern == "sliding-window" else near | (key < SINK)
        return (key <= row) & seen

    torch._dynamo.reset()
    # Compiled, it never holds the mask of all pairs (16 GiB at 128K tokens).
    build = torch.compile(create_block_mask, dynamic=False)
    mask = build(visible, None, None, q.shape[2], k.shape[2], device=DEVICE)
    compiled = torch.compile(flex_attention, dynamic=False)
    return partial(compiled, q, k, v, block_mask=mask, enable_gqa=True)
