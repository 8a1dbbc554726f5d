"""``graphopt::visit_attention``: attention over the keys of visit lists.

Shapes: query [B, Hq, Sq, D], key [B, Hkv, Skv, D], value [B, Hkv, Skv, Dv], result
[B, Hq, Sq, Dv], contiguous; the four list tensors as in `VisitList`. ``dense_rows``
(rows at the end whose blocks see every earlier key) holds one value for all query
heads or one each. ``key_mask``, ``query_offset``, ``scale``, ``softcap`` and
``min_tokens`` are those of `graphopt.ops.attention`; below ``min_tokens`` keys the
attention is causal and the lists are not read. Heads with a block list
(`graphopt.ops.block_list`) read that list alone; ``block_heads`` is empty where no head
has one.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from graphopt.codegen.predicates import BLOCK
from graphopt.ops.block_list import BlockList
from graphopt.ops.recompute import register_backward
from graphopt.ops.reference import attention_reference, masked_attention
from graphopt.ops.visit_checks import check, given_blocks
from graphopt.ops.visit_list import VisitList

_TENSORS = (
    "Tensor query, Tensor key, Tensor value, Tensor? key_mask, Tensor runs, "
    "Tensor run_count, Tensor columns, Tensor column_count, int[] dense_rows, "
    "SymInt query_offset, "
)
_BLOCKS = "Tensor? key_blocks{0}, Tensor? key_block_count{0}, int[] block_heads{1}, "

_library = torch.library.Library("graphopt", "FRAGMENT")
_library.define(
    f"visit_attention({_TENSORS}float? scale=None, float softcap=0.0, "
    f"SymInt min_tokens=0, {_BLOCKS.format('=None', '=[]')}int block={BLOCK}) -> Tensor"
)


def visit_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    visit_list: VisitList,
    dense_rows: Sequence[int] = (0,),
    query_offset: int = 0,
    scale: float | None = None,
    softcap: float = 0.0,
    min_tokens: int = 0,
    blocks: BlockList | None = None,
) -> Tensor:
    """Call ``graphopt::visit_attention``; see the module for shapes and arguments.

    Raises ValueError for shapes or tables that do not fit together.
    """
    return torch.ops.graphopt.visit_attention(
        query, key, value, key_mask, *visit_list, dense_rows, query_offset, scale,
        softcap, min_tokens, *([] if blocks is None else blocks),
    )  # fmt: skip


@torch.library.register_fake("graphopt::visit_attention", lib=_library)
def _fake(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    runs: Tensor,
    run_count: Tensor,
    columns: Tensor,
    column_count: Tensor,
    dense_rows: Sequence[int],
    query_offset: int,
    scale: float | None = None,
    softcap: float = 0.0,
    min_tokens: int = 0,
    key_blocks: Tensor | None = None,
    key_block_count: Tensor | None = None,
    block_heads: Sequence[int] = (),
    block: int = BLOCK,
) -> Tensor:
    blocks = given_blocks(key_blocks, key_block_count, block_heads, block)
    check(query, key, value, runs, dense_rows, blocks)
    return query.new_empty((*query.shape[:3], value.shape[-1]))


def _run(
    kernel: ModuleType,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    runs: Tensor,
    run_count: Tensor,
    columns: Tensor,
    column_count: Tensor,
    dense_rows: Sequence[int],
    query_offset: int,
    scale: float | None = None,
    softcap: float = 0.0,
    min_tokens: int = 0,
    *given: Any,
) -> Tensor:
    """Run the device's ``kernel``, or what stands in for it."""
    blocks = given_blocks(*given)
    check(query, key, value, runs, dense_rows, blocks)
    lists = VisitList(runs, run_count, columns, column_count)
    rest = (query_offset, scale, softcap, min_tokens, *given)
    if key.shape[2] < min_tokens:
        return _dense(query, key, value, key_mask, *rest[:3])
    if not kernel.supports(query.dtype):
        return _reference(query, key, value, key_mask, *lists, dense_rows, *rest)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return kernel.launch(
        query, key, value, key_mask, lists, dense_rows, query_offset, scale, softcap,
        blocks,
    )  # fmt: skip


@torch.library.impl(_library, "visit_attention", "CPU")
def _cpu(*inputs: Any) -> Tensor:
    from graphopt.codegen.cpp import visit as kernel

    return _run(kernel, *inputs)


@torch.library.impl(_library, "visit_attention", "CUDA")
def _cuda(*inputs: Any) -> Tensor:
    from graphopt.codegen.triton import visit as kernel

    return _run(kernel, *inputs)


def _dense(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_mask: Tensor | None,
    query_offset: int,
    scale: float | None,
    softcap: float,
) -> Tensor:
    return torch.ops.graphopt.attention(
        query, key, value, key_mask, "causal", [0], [0], query_offset, scale, softcap
    )


def _reference(query: Tensor, key: Tensor, value: Tensor, *rest: Any) -> Tensor:
    """Attention through the boolean mask that the lists mean."""
    key_mask, *lists, dense_rows, offset, scale, softcap, min_tokens = rest[:10]
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if key.shape[2] < min_tokens:
        static = ("causal", [0], [0], offset, scale, softcap)
        return attention_reference(query, key, value, key_mask, *static)
    blocks = given_blocks(*rest[10:])
    sizes = (query.shape[2], key.shape[2], offset)
    mask = VisitList(*lists).visited(dense_rows, *sizes, blocks)
    return masked_attention(query, key, value, key_mask, mask, scale, softcap)


register_backward(
    _library,
    "visit_attention",
    f"{_TENSORS}float? scale, float softcap, SymInt min_tokens, "
    f"{_BLOCKS.format('', '')}int block",
    _reference,
)
