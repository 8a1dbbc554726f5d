"""``graphopt::select_blocks``: block lists from an estimate of each block's mass.

Shapes: query [B, Hq, Sq, D], key [B, Hkv, Skv, D], ``key_mask`` [B, Skv] or None. The
tables hold one value for all query heads or one each:

- ``stride`` 4, 8 or 16: the head is antidiagonal (XAttention). In blocks of 128, a row
  block keeps its heaviest key blocks until they hold ``threshold`` of its mass; 1.0
  keeps all.
- else ``blocks`` > 0: block-sparse (MInference). In blocks of 64, a row block keeps the
  ``blocks`` key blocks with the greatest product of mean query and mean key.
- both 0: the head has no block list.

The first block and those of the row block's own keys are always kept, and counted. The
lists speak of blocks of ``block`` tokens, which divides the heads' own. A row block has
at most ``cap`` runs: over that, the smallest gaps are filled. Returns the tensors of a
`graphopt.ops.block_list.BlockList`; below ``min_tokens`` keys its lists are empty.
Nothing of size Sq x Skv exists and nothing waits for the device.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from graphopt.ops.block_choice import select_kind
from graphopt.ops.block_kinds import check_tables, head_kinds, kind_lists
from graphopt.ops.block_list import CAP, BlockList, list_shape, require_countable

_library = torch.library.Library("graphopt", "FRAGMENT")
_library.define(
    "select_blocks(Tensor query, Tensor key, Tensor? key_mask, int[] blocks, "
    "int[] stride, float[] threshold, int block, SymInt query_offset, "
    f"float? scale=None, float softcap=0.0, SymInt min_tokens=0, int cap={CAP}) "
    "-> (Tensor, Tensor)"
)


def select_blocks(
    query: Tensor,
    key: Tensor,
    key_mask: Tensor | None,
    blocks: Sequence[int],
    stride: Sequence[int],
    threshold: Sequence[float],
    block: int,
    query_offset: int = 0,
    scale: float | None = None,
    softcap: float = 0.0,
    min_tokens: int = 0,
    cap: int = CAP,
) -> BlockList:
    """Call ``graphopt::select_blocks``; see the module for shapes and arguments.

    Raises ValueError for tables that do not fit and for over 32767 key blocks.
    """
    key_blocks, count = torch.ops.graphopt.select_blocks(
        query, key, key_mask, blocks, stride, threshold, block, query_offset, scale,
        softcap, min_tokens, cap,
    )  # fmt: skip
    kinds = head_kinds(blocks, stride, threshold, query.shape[1])
    return BlockList(key_blocks, count, kind_lists(kinds, query.shape[1]), block)


@torch.library.register_fake("graphopt::select_blocks", lib=_library)
def _empty(
    query: Tensor,
    key: Tensor,
    key_mask: Tensor | None,
    blocks: Sequence[int],
    stride: Sequence[int],
    threshold: Sequence[float],
    block: int,
    query_offset: int,
    scale: float | None = None,
    softcap: float = 0.0,
    min_tokens: int = 0,
    cap: int = CAP,
) -> tuple[Tensor, Tensor]:
    """Return the lists without a block, also what the fake kernel gives."""
    check_tables(blocks, stride, threshold, block, query.shape[1])
    kinds = head_kinds(blocks, stride, threshold, query.shape[1])
    lists = sum(len(kind.heads) for kind in kinds)
    rows, runs = list_shape(query.shape[2], key.shape[2], block, cap)
    shape = (query.shape[0], lists, rows)
    key_blocks = query.new_zeros((*shape, runs, 2), dtype=torch.int16)
    return key_blocks, query.new_zeros(shape, dtype=torch.int32)


def select_blocks_reference(
    query: Tensor,
    key: Tensor,
    key_mask: Tensor | None,
    blocks: Sequence[int],
    stride: Sequence[int],
    threshold: Sequence[float],
    block: int,
    query_offset: int,
    scale: float | None = None,
    softcap: float = 0.0,
    min_tokens: int = 0,
    cap: int = CAP,
) -> tuple[Tensor, Tensor]:
    """Select in plain ATen, on any device; arguments as in the module."""
    tables = (blocks, stride, threshold)
    lists = _empty(query, key, key_mask, *tables, block, 0, cap=cap)
    if key.shape[2] < min_tokens:
        return lists
    require_countable(key.shape[2], block)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    kinds = head_kinds(*tables, query.shape[1])
    list_of = kind_lists(kinds, query.shape[1])
    own = BlockList(lists[0], lists[1], list_of, block)
    for kind in kinds:
        select_kind(own, kind, query, key, key_mask, query_offset, scale, softcap)
    return lists


@torch.library.impl(_library, "select_blocks", "CUDA")
def _cuda(
    query: Tensor,
    key: Tensor,
    key_mask: Tensor | None,
    blocks: Sequence[int],
    stride: Sequence[int],
    threshold: Sequence[float],
    block: int,
    query_offset: int,
    scale: float | None = None,
    softcap: float = 0.0,
    min_tokens: int = 0,
    cap: int = CAP,
) -> tuple[Tensor, Tensor]:
    """Select in Triton; a dtype without kernels is the reference's."""
    from graphopt.ops.block_device import select_kind_on_device, supports

    tables = (blocks, stride, threshold)
    if not supports(query.dtype):
        return select_blocks_reference(
            query, key, key_mask, *tables, block, query_offset, scale, softcap,
            min_tokens, cap,
        )  # fmt: skip
    lists = _empty(query, key, key_mask, *tables, block, 0, cap=cap)
    if key.shape[2] < min_tokens or query.numel() == 0:
        return lists
    require_countable(key.shape[2], block)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    kinds = head_kinds(*tables, query.shape[1])
    own = BlockList(lists[0], lists[1], kind_lists(kinds, query.shape[1]), block)
    for kind in kinds:
        select_kind_on_device(
            own, kind, query, key, key_mask, query_offset, scale, softcap
        )
    return lists


@torch.library.impl(_library, "select_blocks", "CPU")
def _cpu(
    query: Tensor, key: Tensor, key_mask: Tensor | None, *rest: Any
) -> tuple[Tensor, Tensor]:
    from graphopt.codegen.cpp import select_blocks as cpp

    if not cpp.supports(query.dtype):
        return select_blocks_reference(query, key, key_mask, *rest)
    return _cpp(query, key, key_mask, *rest)


def _cpp(
    query: Tensor,
    key: Tensor,
    key_mask: Tensor | None,
    blocks: Sequence[int],
    stride: Sequence[int],
    threshold: Sequence[float],
    block: int,
    query_offset: int,
    scale: float | None = None,
    softcap: float = 0.0,
    min_tokens: int = 0,
    cap: int = CAP,
) -> tuple[Tensor, Tensor]:
    from graphopt.codegen.cpp import select_blocks as cpp

    lists = _empty(query, key, key_mask, blocks, stride, threshold, block, 0, cap=cap)
    if key.shape[2] < min_tokens or query.numel() == 0:
        return lists
    require_countable(key.shape[2], block)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    tables = (blocks, stride, threshold)
    own = kind_lists(head_kinds(*tables, query.shape[1]), query.shape[1])
    cpp.launch(
        query, key, key_mask, tables, lists, own, block, query_offset, scale, softcap
    )
    return lists
