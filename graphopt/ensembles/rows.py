"""Caches whose rows forget different numbers of their last tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphopt.errors import ConfigError


def crop_rows(cache: Any, mask: Tensor, removed: Tensor) -> Tensor:
    """Forget the last ``removed`` [B] tokens of each row, in place; return the mask.

    cache: a transformers cache of keys and values [B, H, T, D] a layer; mask: [B, T] of
    0 and 1. Rows stay aligned at their last token, as prompts padded on the left are:
    rows that forget more begin with padding. Raises ConfigError for layers that do not
    hold every token (sliding windows) or lie in pages.
    """
    least = int(removed.min())
    length = mask.shape[1] - least
    places = torch.arange(length, device=mask.device) - (removed - least)[:, None]
    real = places >= 0
    places = places.clamp(min=0)
    for layer in cache.layers:
        for name in ("keys", "values"):
            held = getattr(layer, name, None)
            if not isinstance(held, Tensor) or held.shape[-2] != mask.shape[1]:
                raise ConfigError(
                    f"crop_rows: a {type(layer).__name__} does not hold all tokens of "
                    "its rows side by side; use a DynamicCache without windows"
                )
            at = places[:, None, :, None].expand(-1, held.shape[1], -1, held.shape[3])
            setattr(layer, name, held.gather(2, at))
    return mask.gather(1, places) * real
