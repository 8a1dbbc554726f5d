"""``graphopt::ragged_page_attention``: rows of a ragged batch attend to their pages.

One call for chunks of prompts and decodes together (Sarathi-Serve, Agrawal et al.
2024). Shapes: query [1, Hq, N, D]; ``starts`` int32 [R + 1], ``past`` int32 [R], table
int32 [R, M], pools and scales as in `graphopt.ops.pages.ragged_append`, which has
written the keys and values [.., Dv] of all queries before. Query i of row r, token
``starts[r] + i`` of N, has position ``past[r] + i`` and sees the keys of its row that
``pattern`` allows, with ``sink``, ``window``, ``scale`` and ``softcap`` as in
`graphopt.ops.attention`. Result [1, Hq, N, Dv], contiguous; zeros for tokens of no
row. Query head h reads KV head ``h // (Hq // Hkv)``. No shape depends on lengths, and
nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from graphopt.codegen.pages import width
from graphopt.codegen.predicates import PATTERNS
from graphopt.ops.pages.held import PageSet
from graphopt.ops.pages.layout import PAGE
from graphopt.ops.pages.ragged_append import check_rows
from graphopt.ops.reference import masked_attention, visible_keys

_library = torch.library.Library("graphopt", "FRAGMENT")
_library.define(
    "ragged_page_attention(Tensor query, Tensor starts, Tensor past, Tensor table, "
    "Tensor key_pages, Tensor value_pages, Tensor? key_scales, Tensor? value_scales, "
    "str pattern, int[] sink, int[] window, float? scale=None, float softcap=0.0) "
    "-> Tensor"
)


def _check(
    query: Tensor,
    starts: Tensor,
    past: Tensor,
    table: Tensor,
    pools: Any,
    pattern: str,
    *tables: Sequence[int],
) -> None:
    check_rows("ragged_page_attention", query, starts, past, table, pools)
    if pattern not in PATTERNS:
        raise ValueError(f"graphopt.ragged_page_attention: unknown pattern '{pattern}'")
    heads, kv_heads = query.shape[1], pools[0].shape[0]
    if heads % kv_heads or pools[1].shape[0] != kv_heads:
        raise ValueError(
            f"graphopt.ragged_page_attention: {heads} query heads do not share "
            f"{kv_heads} key and {pools[1].shape[0]} value heads evenly"
        )
    if query.shape[-1] != width(pools[0]):
        raise ValueError(
            f"graphopt.ragged_page_attention: queries of {query.shape[-1]} channels, "
            f"keys of {width(pools[0])}"
        )
    if any(len(values) not in (1, heads) for values in tables):
        raise ValueError(
            f"graphopt.ragged_page_attention: {[len(t) for t in tables]} values of "
            f"sink and window for {heads} heads; give one, or one each"
        )


@torch.library.register_fake("graphopt::ragged_page_attention", lib=_library)
def _fake(query: Tensor, starts: Tensor, past: Tensor, *inputs: Any) -> Tensor:
    table, *pools = inputs[:5]
    _check(query, starts, past, table, pools, *inputs[5:8])
    return query.new_empty((*query.shape[:3], width(pools[1])))


def ragged_page_attention_reference(
    query: Tensor,
    starts: Tensor,
    past: Tensor,
    table: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
    pattern: str,
    sink: Sequence[int],
    window: Sequence[int],
    scale: float | None = None,
    softcap: float = 0.0,
) -> Tensor:
    """Attend in plain ATen, on any device: every token to every row, behind a mask."""
    pools = (key_pages, value_pages, key_scales, value_scales)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    tokens, room = query.shape[2], table.shape[1] * PAGE
    token, key = (torch.arange(n, device=query.device) for n in (tokens, room))
    out = query.new_zeros((*query.shape[:3], width(value_pages)))
    for begin, end, before, pages in zip(
        starts[:-1], starts[1:], past, table, strict=True
    ):
        offset: Any = before - begin
        held = (key < offset + end)[None]
        seen = visible_keys(pattern, sink, window, tokens, room, offset, query.device)
        own = (token >= begin) & (token < end)
        mask = (seen & held & own[:, None])[None]
        read = PageSet(*pools, pages[None]).read(held, query.dtype)
        out += masked_attention(query, *read, None, mask, scale, softcap)
    return out


@torch.library.impl(_library, "ragged_page_attention", "CUDA")
def _cuda(query: Tensor, *inputs: Any) -> Tensor:
    from graphopt.codegen.triton import ragged as kernel

    return _launched(kernel, query, *inputs)


@torch.library.impl(_library, "ragged_page_attention", "CPU")
def _cpu(query: Tensor, *inputs: Any) -> Tensor:
    from graphopt.codegen.cpp import ragged as kernel

    return _launched(kernel, query, *inputs)


def _launched(kernel: Any, query: Tensor, *inputs: Any) -> Tensor:
    _check(query, *inputs[:3], inputs[3:7], *inputs[7:10])
    if not kernel.supports(query.dtype):
        return ragged_page_attention_reference(query, *inputs)
    return kernel.launch(query, *inputs[:10], *_options(query, *inputs[10:]))


def _options(
    query: Tensor, scale: float | None = None, softcap: float = 0.0
) -> tuple[float, float]:
    return query.shape[-1] ** -0.5 if scale is None else scale, softcap
