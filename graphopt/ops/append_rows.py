"""``graphopt::append_rows``: write a chunk's keys or values behind those of before."""

from __future__ import annotations

import torch
from torch import Tensor

_library = torch.library.Library("graphopt", "FRAGMENT")
_library.define("append_rows(Tensor x, Tensor(a!) rows, SymInt past) -> ()")


def append_rows(x: Tensor, rows: Tensor, past: int) -> None:
    """Write x [B, H, S, D] to rows [B, H, T, D], from token ``past`` on, in place.

    A negative ``past`` is padding in front of a short prompt, which is not written.
    """
    skipped = max(-past, 0)
    new = x.shape[2] - skipped
    rows.narrow(2, past + skipped, new).copy_(x.narrow(2, skipped, new))


torch.library.impl(_library, "append_rows", "CompositeExplicitAutograd")(append_rows)


@torch.library.register_fake("graphopt::append_rows", lib=_library)
def _(x: Tensor, rows: Tensor, past: int) -> None:
    return None
