"""``graphopt::pool_places`` and ``pool_tokens``: neighbours averaged into one."""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.ops.tokens.keep import keep_tokens
from graphopt.ops.tokens.scores import last_tokens

_library = torch.library.Library("graphopt", "FRAGMENT")
_library.define("pool_places(Tensor stream, SymInt count, Tensor? key_mask) -> Tensor")
_library.define("pool_tokens(Tensor x, Tensor kept, Tensor? key_mask) -> Tensor")


def pool_places(stream: Tensor, count: int, key_mask: Tensor | None) -> Tensor:
    """Return where ``count`` runs of tokens end, ascending, int64 [B, count].

    stream [B, S, H]; key_mask bool [B, S], false for padding, or None. The last token
    is a run of its own, and so is the first, on which attention rests; the others are
    shared out to the rest as evenly as whole tokens allow. Padding ends no run while
    real tokens are left, as in `keep_tokens`.
    """
    real = _real(stream, key_mask)
    number = real.long().cumsum(1) - 1  # a real token's place among the real ones
    inner = (number[:, -1:] - 1).clamp(min=1)  # all but the first and the last
    runs = count - 2
    # Token 1 + i of n + 2 ends a run where floor(i runs / n) steps up behind it.
    ends = (number * runs) // inner > ((number - 1) * runs) // inner
    ends = (ends | (number == 0)) & real
    return keep_tokens(ends.float(), count, key_mask)


def pool_tokens(x: Tensor, kept: Tensor, key_mask: Tensor | None) -> Tensor:
    """Return the mean of each run of x [B, S, H], [B, S', H].

    kept int64 [B, S'], ascending: where runs end. A run holds the real tokens behind
    the end of the one before; that of a row's last token holds it alone. Padding that
    ends a run is taken as it is. Sums are of float32 at least.
    """
    real = _real(x, key_mask)
    is_end = torch.zeros_like(real).scatter(1, kept, True)
    run = is_end.long().cumsum(1) - is_end.long()  # S' behind the last end
    last = last_tokens(real)[:, None]
    place = torch.arange(x.shape[1], device=x.device)
    is_last, with_last = place == last, run == run.gather(1, last)
    member = torch.where(with_last, is_last, real | is_end)
    wide = x.to(torch.promote_types(x.dtype, torch.float32))
    wide = wide.masked_fill(~member[..., None], 0.0)
    sums = wide.new_zeros(x.shape[0], kept.shape[1] + 1, x.shape[2])
    sums = sums.scatter_add(1, run[..., None].expand(x.shape), wide)
    sizes = sums.new_zeros(sums.shape[:2]).scatter_add(1, run, member.to(sums.dtype))
    return (sums / sizes.clamp(min=1)[..., None])[:, :-1].to(x.dtype)


def _real(x: Tensor, key_mask: Tensor | None) -> Tensor:
    """Return which tokens of x [B, S, H] are real, bool [B, S]."""
    if key_mask is not None:
        return key_mask
    return torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)


_composite = "CompositeImplicitAutograd"
torch.library.impl(_library, "pool_places", _composite)(pool_places)
torch.library.impl(_library, "pool_tokens", _composite)(pool_tokens)
