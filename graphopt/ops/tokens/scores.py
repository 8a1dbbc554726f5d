"""``graphopt::token_scores`` and the scores of baselines that look at no token."""

from __future__ import annotations

import functools

import torch
from torch import Tensor

_library = torch.library.Library("graphopt", "FRAGMENT")
_library.define(
    "token_scores(Tensor query, Tensor key, Tensor? key_mask, float scale, "
    "float softcap=0.0, int window=0, int observe=1) -> Tensor"
)
_library.define("smooth_scores(Tensor scores, int width) -> Tensor")
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
    observe: int = 1,
) -> Tensor:
    """Return the attention of each row's last token, the mean over heads, [B, S].

    LazyLLM (Fu et al. 2024), equation 1; FastV's rule (Chen et al. 2024) is the same.
    With ``observe`` the mean over so many last tokens too, as many as a row has, each
    of which sees itself and what is before it (SnapKV's window, Li et al. 2024).
    query [B, Hq, S, D], key [B, Hkv, S, D] of the same tokens in their order; key_mask
    bool [B, S], false for padding, or None. The last token of a row is its last one
    that is not padding. ``window`` of 0 means none. Float32 at least; padding gets 0.
    Reads keys once: no S x S tensor.
    """
    place = torch.arange(key.shape[2], device=key.device)
    last = place[-1:, None] if key_mask is None else last_tokens(key_mask)[:, None]
    rows = last - torch.arange(observe, device=key.device)  # [B or 1, N]
    real = rows >= 0
    if key_mask is not None:
        real = real & key_mask.gather(1, rows.clamp(min=0))
    rows = torch.where(real, rows, last)  # counts for nothing
    hidden = place > rows[..., None]
    if window:
        hidden = hidden | (place <= rows[..., None] - window)
    if key_mask is not None:
        hidden = hidden | ~key_mask[:, None]
    batch, heads, _, dim = query.shape
    index = rows[:, None, :, None].expand(batch, heads, observe, dim)
    weights = real / real.sum(1, keepdim=True)
    found = row_scores(query.gather(2, index), key, hidden, scale, softcap)
    return (found * weights[..., None]).sum(1)


def row_scores(
    rows: Tensor, key: Tensor, hidden: Tensor, scale: float, softcap: float
) -> Tensor:
    """Return the attention of query rows to each key, the mean over heads, [B, N, S].

    rows [B, Hq, N, D], key [B, Hkv, S, D], hidden bool [B or 1, N, S].
    """
    wide = torch.promote_types(rows.dtype, torch.float32)
    groups = rows.shape[1] // key.shape[1]
    grouped = rows.to(wide).unflatten(1, (key.shape[1], groups)).flatten(2, 3)
    logits = grouped @ key.to(wide).transpose(2, 3) * scale  # [B, Hkv, G * N, S]
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    logits = logits.unflatten(2, (groups, rows.shape[2]))
    logits = logits.masked_fill(hidden[:, None, None], float("-inf"))
    return logits.softmax(-1).mean((1, 2))


def smooth_scores(scores: Tensor, width: int) -> Tensor:
    """Return the greatest score among ``width`` neighbours of each, [B, S].

    scores [B, S]; width is odd, half of it to either side (SnapKV, section 4): words
    are kept whole.
    """
    half, tokens = width // 2, scores.shape[1]
    # torch 2.13 fixes symbolic sizes in max_pool1d and in pad.
    beyond = scores.new_full((scores.shape[0], half), float("-inf"))
    padded = torch.cat((beyond, scores, beyond), 1)
    near = [padded.narrow(1, i, tokens) for i in range(width)]
    return functools.reduce(torch.maximum, near)


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
torch.library.impl(_library, "smooth_scores", _composite)(smooth_scores)
torch.library.impl(_library, "spread_scores", _composite)(spread_scores)
