"""Ranks that let only vision tokens drop out, and the class token's key set."""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.ops.tokens.keep import is_last

_library = torch.library.Library("graphopt", "FRAGMENT")
_library.define(
    "vision_ranks(Tensor scores, Tensor vision, Tensor? protected, Tensor? key_mask, "
    "SymInt count, bool even=False) -> Tensor"
)
_library.define(
    "class_keys(Tensor query, Tensor key, Tensor? gone, float scale, int count) "
    "-> Tensor"
)
_TOO_FEW = (
    "token-drop: a row has fewer vision tokens and padding than are to be dropped; "
    "give every row as many images, or use thresholds"
)


def vision_ranks(
    scores: Tensor,
    vision: Tensor,
    protected: Tensor | None,
    key_mask: Tensor | None,
    count: int,
    even: bool = False,
) -> Tensor:
    """Return scores by which `keep_tokens` drops vision tokens alone, [B, S].

    scores [B, S]; vision and protected bool [B, S]; key_mask bool [B, S], false for
    padding, or None. Text and a row's last token come before protected vision tokens,
    those before others, and padding between. ``even`` takes vision tokens at equal
    distances instead of by score. ``count`` is what a row will have left; RuntimeError
    where its text alone is more.
    """
    vision = vision & ~is_last(scores, key_mask)
    text = ~vision if key_mask is None else ~vision & key_mask
    held = text.sum(1, keepdim=True)
    torch._assert_async((held <= count).all(), _TOO_FEW)
    if even:
        scores = _even(vision, count - held, scores.dtype)
    top = torch.finfo(scores.dtype).max
    ranks = scores.clamp(max=top / 4)
    if protected is not None:
        ranks = ranks.masked_fill(protected & vision, top)
    if key_mask is not None:
        ranks = ranks.masked_fill(~key_mask, top / 2)
    return ranks.masked_fill(text, float("inf"))


def _even(vision: Tensor, count: Tensor, dtype: torch.dtype) -> Tensor:
    """Return 1 for ``count`` [B, 1] of a row's vision tokens, else 0, [B, S]."""
    number = vision.long().cumsum(1)
    total = number[:, -1:].clamp(min=1)
    count = count.minimum(number[:, -1:])
    taken = (number * count) // total > ((number - 1) * count) // total
    return (taken & vision).to(dtype)


def class_keys(
    query: Tensor, key: Tensor, gone: Tensor | None, scale: float, count: int
) -> Tensor:
    """Return the patches that the class token attends to most, bool [N, P].

    MustDrop's key set (Liu et al. 2024). query [N, Hq, 1 + P, D] and key
    [N, Hkv, 1 + P, D] of an encoder's layer, the class token first; attention is the
    mean over heads. ``count`` patches of each image, the earlier of equals; none of
    ``gone`` (bool [N, P]) while there are others.
    """
    wide = torch.promote_types(query.dtype, torch.float32)
    groups = query.shape[1] // key.shape[1]
    first = query[:, :, 0].to(wide).unflatten(1, (key.shape[1], groups))
    logits = first @ key.to(wide).transpose(2, 3) * scale  # [N, Hkv, G, 1 + P]
    paid = logits.softmax(-1).mean((1, 2))[:, 1:]
    if gone is not None:
        paid = paid.masked_fill(gone, -1)
    order = torch.sort(paid, dim=1, descending=True, stable=True).indices
    return torch.zeros_like(paid, dtype=torch.bool).scatter(1, order[:, :count], True)


_composite = "CompositeImplicitAutograd"
torch.library.impl(_library, "vision_ranks", _composite)(vision_ranks)
torch.library.impl(_library, "class_keys", _composite)(class_keys)
