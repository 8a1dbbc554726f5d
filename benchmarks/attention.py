"""Does the a-shape kernel spend its time on the keys that it visits?

A prefill's attention with sink 128 and window 1024, 9 query and 3 KV heads of dim 64,
against dense causal ``scaled_dot_product_attention`` and compiled FlexAttention with
the same mask. ``density`` is the share of dense pairs that the pattern visits; the rate
is pairs a second over those of dense. ``vertical-slash`` and ``antidiagonal`` run on
queries and keys of SmolLM2's middle layer on real text, since what they visit depends
on them; their selection is timed apart and not part of their rates. The summary's share
of the selection is that of the pattern that spends more on it.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch.nn import functional as F
from torch.nn.attention.flex_attention import create_block_mask, flex_attention

from benchmarks.antidiagonal import antidiagonal_row
from benchmarks.harness import compare, keep, plot
from benchmarks.vertical_slash import vertical_slash_row
from graphopt.codegen.predicates import count_pairs
from graphopt.ops import attention

SINK, WINDOW = 128, 1024
HEADS, KV_HEADS, DIM = 9, 3, 64
PATTERNS = ("a-shape", "streaming", "sliding-window")


def main(quick: bool = False) -> dict[str, Any]:
    """Measure each length and pattern; the summary is that of a-shape."""
    lengths = (2048,) if quick else (2048, 4096, 8192, 16384)
    rows = [
        _row(pattern, tokens, runs=1 if quick else 3)
        for tokens in lengths
        for pattern in PATTERNS
    ]
    longest = 2048 if quick else 8192
    chosen = [
        make(longest, runs=1 if quick else 3)
        for make in (vertical_slash_row, antidiagonal_row)
    ]
    rows += chosen
    row = next(r for r in rows if (r["pattern"], r["tokens"]) == ("a-shape", longest))
    ratio = row["seconds"] / row["dense_seconds"]
    summary = {
        "a_shape_ratio": ratio,
        "a_shape_rate": row["density"] / ratio,
        "vertical_slash_rate": _rate(chosen[0]),
        "antidiagonal_rate": _rate(chosen[1]),
        "selection_share": max(map(_selection_share, chosen)),
    }
    summary = {name: round(value, 4) for name, value in summary.items()}
    if not quick:
        plot("attention", partial(_draw, rows=rows))
    return keep("attention", rows, summary, quick=quick)


def _rate(row: dict[str, Any]) -> float:
    return row["density"] * row["dense_seconds"] / row["seconds"]


def _selection_share(row: dict[str, Any]) -> float:
    return row["selection_seconds"] / (row["selection_seconds"] + row["seconds"])


@torch.no_grad()
def _row(pattern: str, tokens: int, runs: int) -> dict[str, Any]:
    torch.manual_seed(0)
    q = torch.randn(1, HEADS, tokens, DIM)
    k, v = (torch.randn(1, KV_HEADS, tokens, DIM) for _ in range(2))
    sides = {
        "graphopt": lambda: attention(q, k, v, None, pattern, [SINK], [WINDOW], 0),
        "dense": lambda: F.scaled_dot_product_attention(
            q, k, v, is_causal=True, enable_gqa=True
        ),
    }
    if pattern == "a-shape":
        sides["flex"] = _flex(q, k, v, tokens)
    found = compare(sides, runs)
    pairs = count_pairs(pattern, tokens, tokens, 0, SINK, WINDOW)
    row = {
        "pattern": pattern,
        "tokens": tokens,
        "seconds": found["graphopt"].best,
        "dense_seconds": found["dense"].best,
        "flex_seconds": found["flex"].best if "flex" in found else None,
        "density": pairs / count_pairs("causal", tokens, tokens),
        "utilisation": min(s.utilisation for s in found.values()),
    }
    return _rounded(row)


def _rounded(row: dict[str, Any]) -> dict[str, Any]:
    return {n: round(x, 4) if isinstance(x, float) else x for n, x in row.items()}


def _flex(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, tokens: int) -> Any:
    def visible(b: Any, h: Any, row: Any, key: Any) -> Any:
        return (key <= row) & ((key < SINK) | (key > row - WINDOW))

    mask = create_block_mask(visible, None, None, tokens, tokens, device="cpu")
    torch._dynamo.reset()
    compiled = torch.compile(flex_attention, dynamic=False)
    return lambda: compiled(q, k, v, block_mask=mask, enable_gqa=True)


def _draw(axes: Any, rows: list[dict[str, Any]]) -> None:
    for pattern in PATTERNS:
        own = [r for r in rows if r["pattern"] == pattern]
        speedups = [r["dense_seconds"] / r["seconds"] for r in own]
        axes.plot([r["tokens"] for r in own], speedups, marker="o", label=pattern)
    flex = [r for r in rows if r["flex_seconds"]]
    speedups = [r["dense_seconds"] / r["flex_seconds"] for r in flex]
    axes.plot(
        [r["tokens"] for r in flex], speedups, "k--", label="FlexAttention a-shape"
    )
    axes.set(xscale="log", xlabel="prompt tokens", ylabel="speedup over dense SDPA")
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.legend()


if __name__ == "__main__":
    print(main()["summary"])
