"""``graphopt::keep_passing``: as many tokens stay as pass in the row where most do."""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt import _compat
from graphopt.ops.tokens.keep import keep_tokens

_library = torch.library.Library("graphopt", "FRAGMENT")
_library.define("keep_passing(Tensor ranks, float bound, Tensor? key_mask) -> Tensor")


def keep_passing(ranks: Tensor, bound: float, key_mask: Tensor | None) -> Tensor:
    """Return the places of the tokens that stay, ascending, int64 [B, S'].

    ranks [B, S]; key_mask bool [B, S], false for padding, or None. S' is the number of
    ranks of at least ``bound`` in the row that has most of them, padding apart, and at
    least 2. Other rows keep their next best, then padding, as `keep_tokens` has it.
    """
    passing = ranks >= bound
    if key_mask is not None:
        passing = passing & key_mask
    count = max(2, int(passing.sum(1).max()))
    return keep_tokens(ranks, count, key_mask)


torch.library.impl(_library, "keep_passing", "CompositeExplicitAutograd")(keep_passing)


@torch.library.register_fake("graphopt::keep_passing", lib=_library)
def _(ranks: Tensor, bound: float, key_mask: Tensor | None) -> Tensor:
    batch, tokens = ranks.shape
    count = _compat.new_size(ranks, tokens)
    return ranks.new_empty((batch, count), dtype=torch.int64)
