"""Block lists: which blocks of keys each block of query rows visits.

They belong to the heads of `graphopt.ops.visit_attention` whose visited keys are not
the same from row block to row block: block-sparse and antidiagonal. ``heads`` says
which list each query head uses, -1 for none; heads without take no memory. A head with
a list visits the blocks of its list alone: its distances and columns are not read.

Key blocks are absolute, in units of ``block`` keys from key 0; row blocks count from
the call's first query. Of what its row block visits, a row sees the keys up to itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

CAP = 256
"""Runs of one row block, where the caller gives no other number."""

MOST_BLOCKS = 2**15 - 1
"""Key blocks that int16 can count."""


class BlockList(NamedTuple):
    """``key_blocks``: [B, Hb, R, N, 2] int16; ``key_block_count``: [B, Hb, R] int32.

    Runs [begin, end) of key blocks, ascending, apart by at least one block; zero beyond
    the count. R, N: see `list_shape`; Hb: the heads with a list. ``heads`` holds one
    value for each query head.
    """

    key_blocks: Tensor
    key_block_count: Tensor
    heads: tuple[int, ...]
    block: int

    def visited(self, query_len: int, kv_len: int, offset: int) -> Tensor:
        """Return the mask that the lists mean, boolean [B, Hb, query_len, kv_len].

        Written out by hand, to check the kernels.
        """
        device = self.key_blocks.device
        row = torch.arange(query_len, device=device)
        key = torch.arange(kv_len, device=device)
        runs = self.key_blocks.int()[:, :, row // self.block]
        used = self.key_block_count[:, :, row // self.block]
        seen = torch.zeros(*used.shape, kv_len, dtype=torch.bool, device=device)
        for index in range(runs.shape[3]):
            begin, end = (runs[:, :, :, index, i, None] * self.block for i in range(2))
            inside = (key >= begin) & (key < end)
            seen |= inside & (index < used)[..., None]
        return seen & (key <= row[:, None] + offset)


def list_shape(query_len: Any, kv_len: Any, block: int, cap: int) -> tuple[Any, Any]:
    """Return (R, N): row blocks, and runs that one may have; sizes may be symbolic.

    R = ceil(query_len / block). N = min(ceil(K / 2), cap), K = ceil(kv_len / block)
    key blocks: runs that do not touch are at most half as many as blocks. Neither is
    under 2: of a size that may be 1 torch would compile a graph of its own.
    """
    key_blocks = -(-kv_len // block)
    runs = torch.sym_min((key_blocks + 1) // 2, cap)
    return torch.sym_max(-(-query_len // block), 2), torch.sym_max(runs, 2)


def list_bytes(
    batch: int, heads: int, query_len: int, kv_len: int, block: int, cap: int = CAP
) -> int:
    """Return the bytes of a block list: 4 B Hb R N of runs, 4 B Hb R of counts.

    A million tokens in blocks of 128 are 7813 row blocks; at 256 runs and 32 heads that
    is 256.0 MB of runs and 1.0 MB of counts a layer.
    """
    rows, runs = list_shape(query_len, kv_len, block, cap)
    return 4 * batch * heads * int(rows) * (int(runs) + 1)


def list_heads(has_list: Iterable[bool]) -> tuple[int, ...]:
    """Number the heads that have a list in their order; -1 for the others."""
    count, result = 0, []
    for has in has_list:
        result.append(count if has else -1)
        count += has
    return tuple(result)


def require_countable(kv_len: int, block: int) -> None:
    """Raise ValueError for more key blocks than a list can name."""
    if -(-kv_len // block) > MOST_BLOCKS:
        raise ValueError(
            f"graphopt: {kv_len} keys are over {MOST_BLOCKS} blocks of {block}; block "
            "lists count no further, so use another pattern at this length"
        )


def override(seen: Tensor, blocks: BlockList | None, *sizes: int) -> Tensor:
    """Return the mask [B, Hq, ...] with the block lists' heads in their place.

    ``sizes``: query_len, kv_len, offset, as in `BlockList.visited`.
    """
    if blocks is None:
        return seen
    own = blocks.visited(*sizes)
    parts: Sequence[Tensor] = [
        seen[:, head] if index < 0 else own[:, index]
        for head, index in enumerate(blocks.heads)
    ]
    return torch.stack(list(parts), 1)
