"""``graphopt::read_pages``: the keys and values of all tokens, copied out of the pages.

What attention reads when no pass takes the pages themselves: key [B, Hkv, tokens, D]
and value [B, Hkv, tokens, Dv] of ``dtype``, zero beyond a row's own tokens. The first
arguments are those of `graphopt.ops.pages.held.Held`. ``statistics``, ``selected`` and
``selected_at`` are there for the passes that read pages where they lie; nothing here
uses them. ``all_tokens`` int32 [B], where a layer may have fewer: what each row was
given.

Raises RuntimeError where a ring or a pass has dropped some of the tokens.
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
    "SymInt tokens, ScalarType dtype, Tensor? all_tokens=None) -> (Tensor, Tensor)"
)


@torch.library.register_fake("graphopt::read_pages", lib=_library)
def _fake(*inputs: Any) -> tuple[Tensor, Tensor]:
    return _empty(Held.of(*inputs[:15]), *inputs[18:20])


def _empty(held: Held, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    key_dim, value_dim = held.full.widths()
    shape = (held.past.shape[0], held.heads, tokens)
    key = held.past.new_empty((*shape, key_dim), dtype=dtype)
    return key, held.past.new_empty((*shape, value_dim), dtype=dtype)


def read_reference(*inputs: Any) -> tuple[Tensor, Tensor]:
    """Read in plain ATen, on any device; arguments as in the module."""
    held, (tokens, dtype) = Held.of(*inputs[:15]), inputs[18:20]
    _check(held, tokens, *inputs[20:])
    return held.read(tokens, dtype)


def _check(held: Held, tokens: int, all_tokens: Tensor | None = None) -> None:
    if all_tokens is not None and bool((held.total != all_tokens).any()):
        left, given = int(held.total.sum()), int(all_tokens.sum())
        raise RuntimeError(
            f"graphopt.read_pages: {left} of {given} tokens are left in this layer, "
            "and this call attends to all; decode token by token with the pass "
            "'token-drop' compiled in, or reset the cache"
        )
    if not held.kept_by_rings(tokens):
        room = (held.sink_pages + held.ring_pages) * PAGE
        raise RuntimeError(
            f"graphopt.read_pages: streaming heads keep {room} tokens, but this model "
            f"attends to all {tokens}; compile it with backend='graphopt' and the pass "
            "'page-selection', or make the Cache without streaming heads"
        )


torch.library.impl(_library, "read_pages", "CUDA")(read_reference)


@torch.library.impl(_library, "read_pages", "CPU")
def _cpu(*inputs: Any) -> tuple[Tensor, Tensor]:
    from graphopt.codegen.cpp import read_pages as kernel

    held, (tokens, dtype) = Held.of(*inputs[:15]), inputs[18:20]
    coded = held.full.key_scales is not None
    if not kernel.supports(dtype) or not (coded or held.full.keys.dtype == dtype):
        return read_reference(*inputs)
    _check(held, tokens, *inputs[20:])
    key, value = _empty(held, tokens, dtype)
    sets = ((held.full, held.full_heads), (held.ring, held.ring_heads))
    for pages, heads in sets:
        if pages is not None:
            kernel.launch(pages, heads, held.past, held.new, key, value)
    return key, value
