"""``graphopt::token_scores`` and the scores of baselines that look at no token."""

from __future__ import annotations

import torch
from torch import Tensor

_library = torch.library.Library("graphopt", "FRAGMENT")
_library.define(
    "token_scores(Tensor query, Tensor key, Tensor? key_mask, float scale, "
    "float softcap=0.0, int window=0) -> Tensor"
)
_library.define("spread_scores(Tensor stream, int seed) -> Tensor")

# Knuth's multiplier: multiples of it, modulo 2^32, are spread evenly and look random.
_GOLDEN, _RANGE = 2654435761, 1 << 32


def token_scores(
    query: Tensor,
    key: Tensor,
    key_mask: Tensor | None,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
) -> Tensor:
    """Return the attention of each row's last token, the mean over heads, [B, S].

    LazyLLM (Fu et al. 2024), equation 1; FastV's rule (Chen et al. 2024) is the same.
    query [B, Hq, S, D], key [B, Hkv, S, D] of the same tokens in their order; key_mask
    bool [B, S], false for padding, or None. The last token of a row is its last one
    that is not padding. ``window`` of 0 means none. Float32 at least; padding gets 0.
    Reads keys once: no S x S tensor.
    """
    tokens = key.shape[2]
    if key_mask is None:
        rows = query[:, :, -1]
    else:
        batch, heads, _, dim = query.shape
        last = last_tokens(key_mask)[:, None, None, None]
        rows = query.gather(2, last.expand(batch, heads, 1, dim))[:, :, 0]
    place = torch.arange(tokens, device=key.device)
    if key_mask is None:
        hidden = (place < tokens - window) if window else None
    else:
        hidden = ~key_mask
        if window:
            hidden = hidden | (place <= last_tokens(key_mask)[:, None] - window)
        hidden = hidden[:, None, None]
    return row_scores(rows, key, hidden, scale, softcap)


def row_scores(
    rows: Tensor, key: Tensor, hidden: Tensor | None, scale: float, softcap: float
) -> Tensor:
    """Return the attention of one query row to each key, the mean over heads, [B, S].

    rows [B, Hq, D], key [B, Hkv, S, D]; ``hidden`` broadcasts to [B, Hkv, G, S].
    """
    wide = torch.promote_types(rows.dtype, torch.float32)
    grouped = rows.to(wide).unflatten(1, (key.shape[1], -1))
    logits = grouped @ key.to(wide).transpose(2, 3) * scale  # [B, Hkv, G, S]
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    if hidden is not None:
        logits = logits.masked_fill(hidden, float("-inf"))
    return logits.softmax(-1).mean((1, 2))


def last_tokens(key_mask: Tensor) -> Tensor:
    """Return the place of each row's last token that is not padding, int64 [B]."""
    place = torch.arange(key_mask.shape[1], device=key_mask.device)
    return torch.where(key_mask, place, -1).amax(1).clamp(min=0)


def spread_scores(stream: Tensor, seed: int) -> Tensor:
    """Return numbers in [0, 1) that depend on place and ``seed`` alone, float32 [B, S].

    stream [B, S, H]. A baseline: random choice, the same in every run.
    """
    batch, tokens = stream.shape[:2]
    place = torch.arange(1, tokens + 1, device=stream.device)
    mixed = (place * _GOLDEN + seed * 40503) % _RANGE
    mixed = ((mixed ^ (mixed >> 15)) * 2246822519) % _RANGE
    mixed = mixed ^ (mixed >> 13)
    return (mixed.float() / _RANGE).expand(batch, tokens)


_composite = "CompositeImplicitAutograd"
torch.library.impl(_library, "token_scores", _composite)(token_scores)
torch.library.impl(_library, "spread_scores", _composite)(spread_scores)
