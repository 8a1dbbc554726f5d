"""``graphopt::read_pages``: the keys and values of all tokens, copied out of the pages.

What attention reads when no pass takes the pages themselves: key [B, Hkv, tokens, D]
and value [B, Hkv, tokens, Dv] of ``dtype``, zero beyond a row's own tokens. The first
arguments are those of `graphopt.ops.pages.held.Held`. ``statistics``, ``selected`` and
``selected_at`` are there for the passes that read pages where they lie; nothing here
uses them.

Raises RuntimeError where a ring has dropped some of the tokens.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphopt.ops.pages.held import HELD, Held
from graphopt.ops.pages.layout import PAGE

_library = torch.library.Library("graphopt", "FRAGMENT")
_library.define(
    f"read_pages({HELD}Tensor statistics, Tensor selected, Tensor selected_at, "
    "SymInt tokens, ScalarType dtype) -> (Tensor, Tensor)"
)


@torch.library.register_fake("graphopt::read_pages", lib=_library)
def _fake(*inputs: Any) -> tuple[Tensor, Tensor]:
    held, (tokens, dtype) = Held.of(*inputs[:15]), inputs[18:]
    key_dim, value_dim = held.full.widths()
    shape = (held.past.shape[0], held.heads, tokens)
    key = held.past.new_empty((*shape, key_dim), dtype=dtype)
    return key, held.past.new_empty((*shape, value_dim), dtype=dtype)


def read_reference(*inputs: Any) -> tuple[Tensor, Tensor]:
    """Read in plain ATen, on any device; arguments as in the module."""
    held, (tokens, dtype) = Held.of(*inputs[:15]), inputs[18:]
    if not held.kept_by_rings(tokens):
        room = (held.sink_pages + held.ring_pages) * PAGE
        raise RuntimeError(
            f"graphopt.read_pages: streaming heads keep {room} tokens, but this model "
            f"attends to all {tokens}; compile it with backend='graphopt' and the pass "
            "'page-selection', or make the Cache without streaming heads"
        )
    return held.read(tokens, dtype)


for _device in ("CPU", "CUDA"):
    torch.library.impl(_library, "read_pages", _device)(read_reference)
