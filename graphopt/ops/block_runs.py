"""From kept blocks to runs of blocks: `graphopt.ops.block_list` in plain ATen."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from graphopt.ops.visit_list import sorted_places


def runs_of(kept: Tensor, capacity: int) -> tuple[Tensor, Tensor]:
    """Return (runs, count) of ``kept``, boolean [..., K].

    ``runs``: [..., capacity, 2] int16, zero beyond ``count``: [...] int32. Where there
    are more runs than fit, the smallest gaps between them are filled.
    """
    if (kept.shape[-1] + 1) // 2 > capacity:
        kept = fill_gaps(kept, capacity)
    begins, ends = _bounds(kept)
    begin, count = sorted_places(begins, capacity)
    last, _ = sorted_places(ends, capacity)
    used = torch.arange(capacity, device=kept.device) < count[..., None]
    runs = torch.stack((begin, last + 1), -1).masked_fill(~used[..., None], 0)
    return runs.to(torch.int16), count


def fill_gaps(kept: Tensor, most: int) -> Tensor:
    """Return a superset of ``kept`` [..., K] with at most ``most`` runs.

    The smallest gaps are filled, of equal ones the first: each adds fewer blocks than
    any that stays.
    """
    begins, _ = _bounds(kept)
    place = torch.arange(kept.shape[-1], device=kept.device)
    # The last kept block before each place; -1 before the first run.
    last = place.masked_fill(~kept, -1).cummax(-1).values
    previous = pad(last, (1, 0), value=-1)[..., :-1]
    inner = begins & (previous >= 0)
    gap = (place - previous - 1).masked_fill(~inner, kept.shape[-1])
    excess = begins.sum(-1, keepdim=True) - most
    order = gap.argsort(dim=-1, stable=True)
    rank = torch.empty_like(order).scatter_(-1, order, place.expand_as(order))
    filled = inner & (rank < excess)
    # A filled gap runs from after `previous` to the place before its begin.
    change = torch.zeros(*kept.shape[:-1], kept.shape[-1] + 1, device=kept.device)
    change.scatter_add_(-1, (previous + 1).clamp(min=0), filled.float())
    change[..., :-1] -= filled.float()
    return kept | (change.cumsum(-1)[..., :-1] > 0)


def refine(kept: Tensor, factor: int, rows: int, keys: int) -> Tensor:
    """Return ``kept`` [..., R, K] in blocks ``factor`` times smaller, [rows, keys]."""
    if factor > 1:
        kept = kept.repeat_interleave(factor, -2).repeat_interleave(factor, -1)
    return kept[..., :rows, :keys]


def _bounds(kept: Tensor) -> tuple[Tensor, Tensor]:
    """Return where runs begin and where their last block is, boolean like ``kept``."""
    before, after = pad(kept, (1, 0))[..., :-1], pad(kept, (0, 1))[..., 1:]
    return kept & ~before, kept & ~after
