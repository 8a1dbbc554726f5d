"""What the inputs of ``graphopt::visit_attention`` must agree on."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from graphopt.codegen.predicates import BLOCK
from graphopt.ops.block_list import BlockList, list_shape


def check(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    runs: Tensor,
    dense_rows: Sequence[int],
    blocks: BlockList | None,
) -> None:
    """Raise ValueError for heads, lists or tables that do not fit together."""
    heads, kv_heads = query.shape[1], key.shape[1]
    if heads % kv_heads or value.shape[1] != kv_heads:
        raise ValueError(
            f"graphopt.visit_attention: {heads} query heads do not share {kv_heads} "
            f"key and {value.shape[1]} value heads evenly"
        )
    if runs.shape[:2] != query.shape[:2]:
        raise ValueError(
            f"graphopt.visit_attention: lists for {tuple(runs.shape[:2])} rows and "
            f"heads, queries of {tuple(query.shape[:2])}"
        )
    if len(dense_rows) not in (1, heads):
        raise ValueError(
            f"graphopt.visit_attention: dense_rows holds {len(dense_rows)} values for "
            f"{heads} heads"
        )
    if blocks is not None:
        _check_blocks(query, blocks)


def _check_blocks(query: Tensor, blocks: BlockList) -> None:
    lists, heads = max(blocks.heads) + 1, query.shape[1]
    if len(blocks.heads) != heads:
        raise ValueError(
            f"graphopt.visit_attention: block_heads holds {len(blocks.heads)} values "
            f"for {heads} heads"
        )
    rows, _ = list_shape(query.shape[2], 1, blocks.block, 1)
    if blocks.key_blocks.shape[:3] != (query.shape[0], lists, rows):
        raise ValueError(
            f"graphopt.visit_attention: block lists of "
            f"{tuple(blocks.key_blocks.shape[:3])} batch rows, heads and row blocks; "
            f"the call has {(query.shape[0], lists, rows)}"
        )


def given_blocks(
    key_blocks: Tensor | None = None,
    key_block_count: Tensor | None = None,
    block_heads: Sequence[int] = (),
    block: int = BLOCK,
) -> BlockList | None:
    """Return the block lists of a call; None where no head has one.

    Raises ValueError for heads with a list without the lists.
    """
    if not block_heads or max(block_heads) < 0:
        return None
    if key_blocks is None or key_block_count is None:
        raise ValueError("graphopt.visit_attention: block_heads without block lists")
    return BlockList(key_blocks, key_block_count, tuple(block_heads), block)
