"""Operators on single tokens in pages: write, score and attend to those at places.

Shapes: ``places`` int64 [B, S], a token's place among all of its row; table, pools and
scales as in `graphopt.ops.pages.layout`. ``seen`` int64 [B, N] lists the places that a
row looks at, ascending, -1 behind the last; the tokens there must have been written.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from graphopt.codegen.pages import width
from graphopt.ops.pages.append import store
from graphopt.ops.pages.layout import PAGE, decode
from graphopt.ops.reference import masked_attention
from graphopt.ops.tokens.scores import row_scores

_library = torch.library.Library("graphopt", "FRAGMENT")
_library.define(
    "write_tokens(Tensor key, Tensor value, Tensor places, Tensor table, "
    "Tensor(a!) key_pages, Tensor(b!) value_pages, Tensor(c!)? key_scales, "
    "Tensor(d!)? value_scales) -> ()"
)
_library.define(
    "place_scores(Tensor query, Tensor seen, Tensor table, Tensor key_pages, "
    "Tensor? key_scales, float scale, float softcap=0.0) -> Tensor"
)
_library.define(
    "place_attention(Tensor query, Tensor places, Tensor seen, Tensor table, "
    "Tensor key_pages, Tensor value_pages, Tensor? key_scales, Tensor? value_scales, "
    "float scale, float softcap=0.0) -> Tensor"
)


def write_tokens(
    key: Tensor,
    value: Tensor,
    places: Tensor,
    table: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
) -> None:
    """Write key [B, H, S, D] and value [B, H, S, Dv] at ``places``, in place."""
    page, slot = _found(places, table)
    store(key, key_pages, key_scales, page, slot)
    store(value, value_pages, value_scales, page, slot)


def place_scores(
    query: Tensor,
    seen: Tensor,
    table: Tensor,
    key_pages: Tensor,
    key_scales: Tensor | None,
    scale: float,
    softcap: float = 0.0,
) -> Tensor:
    """Return the newest token's attention to each of ``seen``, mean over heads, [B, N].

    LazyLLM (Fu et al. 2024), equation 1. query [B, Hq, S, D], the newest token last.
    Float32 at least; places of -1 get 0.
    """
    key = _gathered(key_pages, key_scales, _written(seen), table, query.dtype)
    hidden = (seen < 0)[:, None]
    return row_scores(query[:, :, -1:], key, hidden, scale, softcap)[:, 0]


def place_attention(
    query: Tensor,
    places: Tensor,
    seen: Tensor,
    table: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
    scale: float,
    softcap: float = 0.0,
) -> Tensor:
    """Attend from tokens at ``places`` to those of ``seen`` that are not behind them.

    query [B, Hq, S, D]; the result is [B, Hq, S, Dv]. Every one of ``places`` is among
    ``seen``.
    """
    at = _written(seen)
    key = _gathered(key_pages, key_scales, at, table, query.dtype)
    value = _gathered(value_pages, value_scales, at, table, query.dtype)
    mask = ((seen[:, None] <= places[:, :, None]) & (seen >= 0)[:, None])[:, None]
    if softcap:
        return masked_attention(query, key, value, None, mask, scale, softcap)
    found = scaled_dot_product_attention(
        query, key, value, attn_mask=mask, scale=scale, enable_gqa=True
    )
    return found.contiguous()


def _found(places: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
    """Return page of the pool and slot, each [B, S]."""
    return table.gather(1, places // PAGE).long(), places % PAGE


def _written(seen: Tensor) -> Tensor:
    """Put the newest of a row, which is written, where there is none.

    What is not written may be anything, NaN too, and no mask hides that.
    """
    return torch.where(seen < 0, seen.amax(1, keepdim=True), seen)


def _gathered(
    pool: Tensor, scales: Tensor | None, at: Tensor, table: Tensor, dtype: torch.dtype
) -> Tensor:
    page, slot = _found(at, table)
    scales = None if scales is None else scales[:, page, slot]
    return decode(pool[:, page, slot], scales, dtype).transpose(0, 1)


for _operator in (write_tokens, place_scores, place_attention):
    _name = _operator.__name__
    torch.library.impl(_library, _name, "CompositeExplicitAutograd")(_operator)


def _check(x: Tensor, places: Tensor, heads: Any = None) -> None:
    """Sizes are solved for: a call that broadcasts would be taken for one that fits."""
    if (x.shape[0], x.shape[2]) != tuple(places.shape):
        raise ValueError(f"{tuple(x.shape)} is not of places {tuple(places.shape)}")
    if heads is not None and x.shape[1] != heads:
        raise ValueError(f"{tuple(x.shape)} is not of {heads} heads")


@torch.library.register_fake("graphopt::write_tokens", lib=_library)
def _write(
    key: Tensor, value: Tensor, places: Tensor, table: Tensor, pool: Tensor, *_: Any
) -> None:
    _check(key, places, pool.shape[0])
    _check(value, places, pool.shape[0])


@torch.library.register_fake("graphopt::place_scores", lib=_library)
def _scores(query: Tensor, seen: Tensor, *_: Any) -> Tensor:
    wide = torch.promote_types(query.dtype, torch.float32)
    return query.new_empty(seen.shape, dtype=wide)


@torch.library.register_fake("graphopt::place_attention", lib=_library)
def _attention(
    query: Tensor, places: Tensor, seen: Tensor, table: Tensor, *pools: Any
) -> Tensor:
    _check(query, places)
    return query.new_empty((*query.shape[:3], width(pools[1])))
