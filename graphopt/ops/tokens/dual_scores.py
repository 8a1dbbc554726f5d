"""``graphopt::dual_scores``: how far each vision token is above MustDrop's thresholds.

MustDrop (Liu et al. 2024), the dual-attention filter of the prefill: a vision token
goes only if both the sum and the maximum of what the text behind the images pays it
are under their thresholds. Where ranks share heads out, ``text_attention`` gives the
mean over a rank's, of which ``dual_from`` makes scores once ranks have made it one.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphopt import _compat

_library = torch.library.Library("graphopt", "FRAGMENT")
_library.define(
    "dual_scores(Tensor query, Tensor key, Tensor vision, Tensor? key_mask, "
    "float scale, float global_threshold, float individual_threshold, "
    "float softcap=0.0, int window=0) -> Tensor"
)
_library.define(
    "text_attention(Tensor query, Tensor key, Tensor vision, Tensor? key_mask, "
    "float scale, float softcap=0.0, int window=0) -> Tensor"
)
_library.define(
    "dual_from(Tensor attention, Tensor vision, float global_threshold, "
    "float individual_threshold) -> Tensor"
)
_CELLS = 1 << 24  # of attention held at a time


def dual_scores(
    query: Tensor,
    key: Tensor,
    vision: Tensor,
    key_mask: Tensor | None,
    scale: float,
    global_threshold: float,
    individual_threshold: float,
    softcap: float = 0.0,
    window: int = 0,
) -> Tensor:
    """Return max(global / its threshold, individual / its threshold), [B, S].

    query [B, Hq, S, D], key [B, Hkv, S, D] of the same tokens in their order; vision
    bool [B, S]; key_mask bool [B, S], false for padding, or None. The rows are the text
    tokens behind a batch row's last vision token, and attention is the mean over heads:
    ``global`` is its sum over the rows, as a share of what all vision tokens get, and
    ``individual`` its maximum. Under 1 both thresholds are missed. Without such rows
    every score is infinite, and other tokens' scores mean nothing.

    Only rows x S is held, in pieces; never S x S. Float32 at least.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    rows, seen = _text_rows(vision, key_mask)
    total = query.new_zeros(vision.shape, dtype=wide)
    most = torch.zeros_like(total)
    cells = query.shape[0] * query.shape[1] * query.shape[2]  # of one row
    step = max(1, _CELLS // max(1, cells))
    for start in range(0, rows.shape[1], step):
        part = slice(start, start + step)
        paid = _attention(query, key, rows[:, part], key_mask, scale, softcap, window)
        paid = paid.masked_fill(~seen[:, part, None], 0)
        total = total + paid.sum(1)
        most = torch.maximum(most, paid.amax(1))
    return _scores(total, most, vision, (global_threshold, individual_threshold))


def text_attention(
    query: Tensor,
    key: Tensor,
    vision: Tensor,
    key_mask: Tensor | None,
    scale: float,
    softcap: float = 0.0,
    window: int = 0,
) -> Tensor:
    """Return what text behind the images pays to each token, [B, R, S].

    The mean over the heads that ``query`` has; arguments as for `dual_scores`. R is the
    number of such rows, 2 at least; those that a batch row lacks are zero.
    """
    rows, seen = _text_rows(vision, key_mask, least=2)
    paid = _attention(query, key, rows, key_mask, scale, softcap, window)
    return paid.masked_fill(~seen[..., None], 0)


def dual_from(
    attention: Tensor,
    vision: Tensor,
    global_threshold: float,
    individual_threshold: float,
) -> Tensor:
    """Return the scores of `dual_scores` by the mean over all heads [B, R, S]."""
    thresholds = (global_threshold, individual_threshold)
    return _scores(attention.sum(1), attention.amax(1), vision, thresholds)


def _scores(
    total: Tensor, most: Tensor, vision: Tensor, thresholds: tuple[float, float]
) -> Tensor:
    everything = total.masked_fill(~vision, 0).sum(1, keepdim=True)
    both = torch.maximum(total / (everything * thresholds[0]), most / thresholds[1])
    endless = float("inf")
    return both.masked_fill(everything == 0, endless).nan_to_num(endless, endless)


def _text_rows(
    vision: Tensor, key_mask: Tensor | None, least: int = 0
) -> tuple[Tensor, Tensor]:
    """Return the places of ``least`` rows or more, [B, R], and which are real."""
    place = torch.arange(vision.shape[1], device=vision.device)
    last = torch.where(vision, place, -1).amax(1, keepdim=True)
    text = (place > last) & (last >= 0)
    if key_mask is not None:
        text = text & key_mask
    count = text.sum(1)
    most = max(least, int(count.max()) if count.numel() else 0)
    rows = torch.sort(text.to(torch.int8), dim=1, descending=True, stable=True).indices
    seen = torch.arange(most, device=vision.device) < count[:, None]
    return rows[:, :most], seen


def _attention(
    query: Tensor,
    key: Tensor,
    rows: Tensor,
    key_mask: Tensor | None,
    scale: float,
    softcap: float,
    window: int,
) -> Tensor:
    """Return the attention of some rows, the mean over heads, [B, R, S]."""
    wide = torch.promote_types(query.dtype, torch.float32)
    batch, heads, _, dim = query.shape
    kv_heads, tokens = key.shape[1:3]
    wanted = rows[:, None, :, None].expand(batch, heads, rows.shape[1], dim)
    some = query.gather(2, wanted).to(wide).unflatten(1, (kv_heads, heads // kv_heads))
    logits = some @ key.to(wide).transpose(2, 3)[:, :, None] * scale
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    place = torch.arange(tokens, device=key.device)
    hidden = place > rows[:, :, None]
    if window:
        hidden = hidden | (place <= rows[:, :, None] - window)
    if key_mask is not None:
        hidden = hidden | ~key_mask[:, None]
    logits = logits.masked_fill(hidden[:, None, None], float("-inf"))
    return logits.softmax(-1).mean((1, 2))


# The number of rows depends on data, so this runs as one operator and is not traced.
for _operator in (dual_scores, text_attention, dual_from):
    torch.library.impl(_library, _operator.__name__, "CompositeExplicitAutograd")(
        _operator
    )


@torch.library.register_fake("graphopt::text_attention", lib=_library)
def _text_attention(
    query: Tensor, key: Tensor, vision: Tensor, key_mask: Tensor | None, *rest: Any
) -> Tensor:
    wide = torch.promote_types(query.dtype, torch.float32)
    batch, tokens = vision.shape
    rows = _compat.new_size(query, tokens)
    return query.new_empty((batch, rows, tokens), dtype=wide)


@torch.library.register_fake("graphopt::dual_from", lib=_library)
def _dual_from(attention: Tensor, vision: Tensor, *thresholds: float) -> Tensor:
    return attention.new_empty(vision.shape)


@torch.library.register_fake("graphopt::dual_scores", lib=_library)
def _(
    query: Tensor,
    key: Tensor,
    vision: Tensor,
    key_mask: Tensor | None,
    scale: float,
    global_threshold: float,
    individual_threshold: float,
    softcap: float = 0.0,
    window: int = 0,
) -> Tensor:
    torch._check(key.shape[2] == vision.shape[1])
    torch._check(query.shape[2] == vision.shape[1])
    wide = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(vision.shape, dtype=wide)
