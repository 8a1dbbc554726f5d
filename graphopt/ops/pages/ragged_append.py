"""``graphopt::append_ragged``: write the new tokens of many rows into their pages.

Rows of a ragged batch lie one after the other (Sarathi-Serve, Agrawal et al. 2024:
chunks of prompts and decodes in one call). Shapes: key [1, Hkv, N, D], value
[1, Hkv, N, Dv]; ``starts`` int32 [R + 1], ascending: the new tokens of row r are
``starts[r]`` to ``starts[r + 1] - 1`` of N, perhaps none; tokens from ``starts[R]`` on
are padding and written nowhere. ``past`` int32 [R], the tokens that each row holds
already; table int32 [R, M], pools and scales as in `graphopt.ops.pages.layout`. Rows
may share pages that none of them writes to. Nothing waits for the device, and no
tensor moves.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from graphopt.codegen.pages import width
from graphopt.ops.pages.append import store
from graphopt.ops.pages.layout import PAGE

_library = torch.library.Library("graphopt", "FRAGMENT")
_library.define(
    "append_ragged(Tensor key, Tensor value, Tensor starts, Tensor past, Tensor table, "
    "Tensor(a!) key_pages, Tensor(b!) value_pages, Tensor(c!)? key_scales, "
    "Tensor(d!)? value_scales) -> ()"
)


def check_rows(
    name: str,
    tokens: Tensor,
    starts: Tensor,
    past: Tensor,
    table: Tensor,
    pools: Sequence[Any],
) -> None:
    """Raise ValueError where rows, tables and pools do not fit ``tokens`` [1, H, N, D].

    ``name`` is the operator's; lengths are data and not looked at.
    """
    rows = past.shape[0]
    if tokens.shape[0] != 1 or starts.shape[0] != rows + 1 or table.shape[0] != rows:
        raise ValueError(
            f"graphopt.{name}: {tuple(tokens.shape)} tokens, {starts.shape[0]} starts, "
            f"{rows} rows of past and {table.shape[0]} of the table; R rows have one "
            "batch of tokens, R + 1 starts and R of the others"
        )
    if any(t.dtype != torch.int32 for t in (starts, past, table)):
        raise ValueError(f"graphopt.{name}: starts, past and table are not all int32")
    keys, _, *scales = pools
    if (scales[0] is None or scales[1] is None) == (not keys.dtype.is_floating_point):
        raise ValueError(f"graphopt.{name}: pools of codes have scales, floats none")
    if keys.dtype.is_floating_point and keys.dtype != tokens.dtype:
        raise ValueError(
            f"graphopt.{name}: pages of {keys.dtype} for tokens of {tokens.dtype}"
        )


@torch.library.register_fake("graphopt::append_ragged", lib=_library)
def _fake(
    key: Tensor, value: Tensor, starts: Tensor, past: Tensor, table: Tensor, *pools: Any
) -> None:
    _check(key, value, starts, past, table, *pools)


def _check(
    key: Tensor, value: Tensor, starts: Tensor, past: Tensor, table: Tensor, *pools: Any
) -> None:
    check_rows("append_ragged", key, starts, past, table, pools)
    for x, pool in zip((key, value), pools[:2], strict=True):
        if (x.shape[1], x.shape[2:]) != (pool.shape[0], (key.shape[2], width(pool))):
            raise ValueError(
                f"graphopt.append_ragged: tokens of {tuple(x.shape)} do not fit pages "
                f"of {pool.shape[0]} heads and {width(pool)} channels"
            )


def append_ragged_reference(
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    past: Tensor,
    table: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
) -> None:
    """Append in plain ATen, on any device; arguments as in the module."""
    token = torch.arange(key.shape[2], device=key.device)
    token = token[(token >= starts[0]) & (token < starts[-1])]
    row = torch.searchsorted(starts[1:].contiguous(), token, right=True)
    position = past[row] + token - starts[row]
    page, slot = table[row, position // PAGE].long()[None], (position % PAGE)[None]
    store(key[:, :, token], key_pages, key_scales, page, slot)
    store(value[:, :, token], value_pages, value_scales, page, slot)


@torch.library.impl(_library, "append_ragged", "CUDA")
def _cuda(key: Tensor, value: Tensor, starts: Tensor, *cache: Any) -> None:
    from graphopt.codegen.triton import ragged_append as kernel

    _check(key, value, starts, *cache)
    if kernel.supports(key.dtype):
        kernel.launch(key, value, starts, *cache)
    else:
        append_ragged_reference(key, value, starts, *cache)


@torch.library.impl(_library, "append_ragged", "CPU")
def _cpu(key: Tensor, value: Tensor, starts: Tensor, *cache: Any) -> None:
    from graphopt.codegen.cpp import pages as kernel

    _check(key, value, starts, *cache)
    if kernel.supports(key.dtype):
        kernel.append_ragged(key, value, starts, *cache)
    else:
        append_ragged_reference(key, value, starts, *cache)
