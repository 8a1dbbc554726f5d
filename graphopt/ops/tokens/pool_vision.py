"""``graphopt::pool_vision``: vision tokens that stay stand for their neighbours."""

from __future__ import annotations

import torch
from torch import Tensor

_library = torch.library.Library("graphopt", "FRAGMENT")
_library.define("pool_vision(Tensor x, Tensor kept, Tensor vision) -> Tensor")


def pool_vision(x: Tensor, kept: Tensor, vision: Tensor) -> Tensor:
    """Return x [B, S, H] with means of vision tokens in the places that stay.

    A baseline. kept int64 [B, S'] are those places, vision bool [B, S]: a kept vision
    token becomes the mean of itself and of the vision tokens in front of it, back to
    the kept one before. Sums are float32 at least.
    """
    stays = torch.zeros_like(vision).scatter(1, kept, True) & vision
    run = stays.long().cumsum(1) - stays.long()  # the kept vision tokens in front
    wide = torch.promote_types(x.dtype, torch.float32)
    mine = vision[:, :, None].to(wide)
    index = run[:, :, None]
    count = torch.zeros_like(mine).scatter_add(1, index, mine)
    whole = index.expand_as(x)
    members = x.to(wide) * mine
    total = torch.zeros_like(members).scatter_add(1, whole, members)
    mean = (total / count.clamp(min=1)).gather(1, whole)
    return torch.where(stays[:, :, None], mean.to(x.dtype), x)


torch.library.impl(_library, "pool_vision", "CompositeImplicitAutograd")(pool_vision)
