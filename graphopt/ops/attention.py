"""``graphopt::attention``: attention over the keys that a static pattern allows.

Shapes: query [B, Hq, Sq, D], key [B, Hkv, Skv, D], value [B, Hkv, Skv, Dv], result
[B, Hq, Sq, Dv], contiguous. Query head h reads KV head ``h // (Hq // Hkv)``.
``key_mask`` [B, Skv] is true where a key is visible at all. ``sink`` and ``window``
(tokens) hold one value for all query heads or one each. ``query_offset`` is the
position of the first query on the key axis. ``scale`` None is ``1/sqrt(D)``;
``softcap`` c > 0 turns a score s into ``c tanh(s/c)`` (Gemma 2). A row that sees no key
gives zeros.
With fewer than ``min_tokens`` keys the pattern is causal, whatever its name: an
approximate pass stays exact, and fast, on short prompts inside one compiled graph.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from graphopt.codegen.predicates import PATTERNS
from graphopt.ops.dense import dense_causal, is_dense_causal
from graphopt.ops.recompute import register_backward
from graphopt.ops.reference import attention_reference

_SCHEMA = (
    "attention(Tensor query, Tensor key, Tensor value, Tensor? key_mask, str pattern, "
    "int[] sink, int[] window, SymInt query_offset, float? scale=None, "
    "float softcap=0.0, SymInt min_tokens=0) -> Tensor"
)

_library = torch.library.Library("graphopt", "DEF")
_library.define(_SCHEMA)


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    pattern: str,
    sink: Sequence[int],
    window: Sequence[int],
    query_offset: int,
    scale: float | None = None,
    softcap: float = 0.0,
    min_tokens: int = 0,
) -> Tensor:
    """Call ``graphopt::attention``; see the module for shapes and arguments.

    Raises ValueError for shapes, patterns or tables that do not fit together.
    """
    return torch.ops.graphopt.attention(
        query, key, value, key_mask, pattern, sink, window, query_offset, scale,
        softcap, min_tokens,
    )  # fmt: skip


def _check(
    query: Tensor, key: Tensor, value: Tensor, pattern: str, *tables: Sequence[int]
) -> None:
    if pattern not in PATTERNS:
        raise ValueError(f"graphopt.attention: unknown pattern '{pattern}'")
    heads, kv_heads = query.shape[1], key.shape[1]
    if heads % kv_heads or value.shape[1] != kv_heads:
        raise ValueError(
            f"graphopt.attention: {heads} query heads do not share {kv_heads} key and "
            f"{value.shape[1]} value heads evenly"
        )
    if query.shape[-1] != key.shape[-1]:
        raise ValueError("graphopt.attention: query and key differ in head_dim")
    for table in tables:
        if len(table) not in (1, heads):
            raise ValueError(
                f"graphopt.attention: a table of {len(table)} values for {heads} heads"
            )


@torch.library.register_fake("graphopt::attention", lib=_library)
def _fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    pattern: str,
    sink: Sequence[int],
    window: Sequence[int],
    query_offset: int,
    scale: float | None = None,
    softcap: float = 0.0,
    min_tokens: int = 0,
) -> Tensor:
    _check(query, key, value, pattern, sink, window)
    return query.new_empty((*query.shape[:3], value.shape[-1]))


@torch.library.impl(_library, "attention", "CPU")
def _cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    pattern: str,
    sink: Sequence[int],
    window: Sequence[int],
    query_offset: int,
    scale: float | None = None,
    softcap: float = 0.0,
    min_tokens: int = 0,
) -> Tensor:
    from graphopt.codegen.cpp import attention as cpp

    _check(query, key, value, pattern, sink, window)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    pattern = _effective(pattern, key, min_tokens)
    plain = is_dense_causal(query, key, key_mask, query_offset, softcap)
    if pattern == "causal" and plain:
        return dense_causal(query, key, value, scale)
    arguments = (pattern, sink, window, query_offset, scale, softcap)
    if not cpp.supports(query.dtype):
        return attention_reference(query, key, value, key_mask, *arguments)
    return cpp.launch(query, key, value, key_mask, *arguments)


@torch.library.impl(_library, "attention", "CUDA")
def _cuda(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    pattern: str,
    sink: Sequence[int],
    window: Sequence[int],
    query_offset: int,
    scale: float | None = None,
    softcap: float = 0.0,
    min_tokens: int = 0,
) -> Tensor:
    from graphopt.codegen.triton import attention as triton_attention

    _check(query, key, value, pattern, sink, window)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    pattern = _effective(pattern, key, min_tokens)
    plain = is_dense_causal(query, key, key_mask, query_offset, softcap)
    if pattern == "causal" and plain:
        return dense_causal(query, key, value, scale)
    arguments = (pattern, sink, window, query_offset, scale, softcap)
    if not triton_attention.supports(query.dtype):
        return attention_reference(query, key, value, key_mask, *arguments)
    return triton_attention.launch(query, key, value, key_mask, *arguments)


def _effective(pattern: str, key: Tensor, min_tokens: int) -> str:
    return "causal" if key.shape[2] < min_tokens else pattern


def _reference(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    key_mask, pattern, sink, window, offset, scale, softcap, min_tokens = rest
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    pattern = _effective(pattern, key, min_tokens)
    return attention_reference(
        query, key, value, key_mask, pattern, sink, window, offset, scale, softcap
    )


register_backward(
    _library,
    "attention",
    "Tensor query, Tensor key, Tensor value, Tensor? key_mask, str pattern, "
    "int[] sink, int[] window, SymInt query_offset, float? scale, float softcap, "
    "SymInt min_tokens",
    _reference,
)
