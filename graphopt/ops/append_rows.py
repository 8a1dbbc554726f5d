"""``graphopt::append_rows``: write a chunk's keys or values behind those of before."""

from __future__ import annotations

import torch
from torch import Tensor

_library = torch.library.Library("graphopt", "FRAGMENT")
_library.define("append_rows(Tensor x, Tensor(a!) rows, SymInt past) -> ()")


def append_rows(x: Tensor, rows: Tensor, past: int) -> None:
    """Write x [B, H, S, D] to rows [B, H, T, D], from token ``past`` on, in place.

    What would lie behind the last row, the padding of a prompt's last chunk, is left.
    """
    new = min(x.shape[2], rows.shape[2] - past)
    rows.narrow(2, past, new).copy_(x.narrow(2, 0, new))


torch.library.impl(_library, "append_rows", "CompositeExplicitAutograd")(append_rows)


@torch.library.register_fake("graphopt::append_rows", lib=_library)
def _(x: Tensor, rows: Tensor, past: int) -> None:
    return None
