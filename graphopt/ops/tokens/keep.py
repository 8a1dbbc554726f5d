"""``graphopt::keep_tokens``: which tokens of each row stay."""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.ops.tokens.scores import last_tokens

_library = torch.library.Library("graphopt", "FRAGMENT")
_library.define(
    "keep_tokens(Tensor scores, SymInt count, Tensor? key_mask, bool even=False) "
    "-> Tensor"
)


def keep_tokens(
    scores: Tensor, count: int, key_mask: Tensor | None, even: bool = False
) -> Tensor:
    """Return the places of the ``count`` tokens that stay, ascending, int64 [B, count].

    scores [B, S]; key_mask bool [B, S], false for padding, or None. A row's last token
    stays; then the greatest scores, the earlier of equals; padding only when no other
    token is left. ``even`` takes tokens at equal distances instead of by score.
    """
    if even:
        scores = _even(scores, count, key_mask)
    scores = scores.masked_fill(is_last(scores, key_mask), float("inf"))
    if key_mask is not None:
        scores = scores.masked_fill(~key_mask, float("-inf"))
    order = torch.sort(scores, dim=1, descending=True, stable=True).indices
    return order[:, :count].sort(1).values


def is_last(scores: Tensor, key_mask: Tensor | None) -> Tensor:
    """Return where a row's last token is that is not padding, bool [B or 1, S]."""
    place = torch.arange(scores.shape[1], device=scores.device)
    if key_mask is None:
        return (place == scores.shape[1] - 1)[None]
    return place == last_tokens(key_mask)[:, None]


def _even(scores: Tensor, count: int, key_mask: Tensor | None) -> Tensor:
    """Return 1 for ``count`` of a row's tokens at equal distances, else 0, [B, S].

    The i-th of n real tokens is taken where floor(i count / n) steps up behind it.
    """
    real = torch.ones_like(scores, dtype=torch.bool) if key_mask is None else key_mask
    number = real.long().cumsum(1)
    total = number[:, -1:].clamp(min=1)
    taken = (number * count) // total > ((number - 1) * count) // total
    return (taken & real).to(scores.dtype)


torch.library.impl(_library, "keep_tokens", "CompositeImplicitAutograd")(keep_tokens)
