"""Operators on the tokens of a layer whose cache keeps fewer than came."""

from __future__ import annotations

import torch
from torch import Tensor

_library = torch.library.Library("graphopt", "FRAGMENT")
_library.define("real_first(Tensor key_mask) -> Tensor")
_library.define(
    "visible_tokens(Tensor key_mask, Tensor past, SymInt new, Tensor all_tokens) "
    "-> Tensor"
)


def real_first(key_mask: Tensor) -> Tensor:
    """Return the places of each row's real tokens in their order, padding behind them.

    key_mask bool [B, S], false for padding; the result is int64 [B, S].
    """
    return torch.sort((~key_mask).byte(), dim=1, stable=True).indices


def visible_tokens(
    key_mask: Tensor, past: Tensor, new: int, all_tokens: Tensor
) -> Tensor:
    """Return which tokens of a layer a row may see, bool [B, S].

    key_mask bool [B, S] of the tokens that came; past int32 [B], those that the layer
    held before the ``new`` ones; all_tokens int32 [B], those that came. A layer that
    dropped some keeps no padding, and holds the rest without gaps.
    """
    return key_mask | (past + new != all_tokens)[:, None]


_composite = "CompositeImplicitAutograd"
torch.library.impl(_library, "real_first", _composite)(real_first)
torch.library.impl(_library, "visible_tokens", _composite)(visible_tokens)
