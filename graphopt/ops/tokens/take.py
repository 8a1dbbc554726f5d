"""``graphopt::take_tokens``: the tokens of each row at given places."""

from __future__ import annotations

import torch
from torch import Tensor

_library = torch.library.Library("graphopt", "FRAGMENT")
_library.define("take_tokens(Tensor x, Tensor kept, int axis) -> Tensor")


def take_tokens(x: Tensor, kept: Tensor, axis: int) -> Tensor:
    """Return x [B or 1, ..., S, ...] with the places ``kept`` [B, S'] of ``axis``.

    A first axis of one stands for every row, so the result's is B.
    """
    wanted = [1] * x.ndim
    wanted[0], wanted[axis] = kept.shape
    sizes = list(x.shape)
    sizes[0], sizes[axis] = kept.shape
    rows = x.expand(kept.shape[0], *x.shape[1:])
    return rows.gather(axis, kept.view(wanted).expand(sizes))


torch.library.impl(_library, "take_tokens", "CompositeImplicitAutograd")(take_tokens)
