"""Block lists made by hand, and the maps of blocks that they mean."""

from __future__ import annotations

import torch

from graphopt.ops.block_list import CAP, BlockList, list_heads, list_shape
from graphopt.ops.block_runs import runs_of
from graphopt.ops.visit_list import VisitList


def block_map(lists, kv_len):
    """Which blocks are kept, boolean [B, Hb, R, K], read off the runs one by one."""
    runs, count = lists.key_blocks.tolist(), lists.key_block_count
    kept = torch.zeros(*count.shape, -(-kv_len // lists.block), dtype=torch.bool)
    for place in torch.cartesian_prod(*map(torch.arange, count.shape)).tolist():
        b, h, row = place
        for begin, end in runs[b][h][row][: count[b, h, row]]:
            assert 0 <= begin < end <= kept.shape[3]
            kept[b, h, row, begin:end] = True
    return kept


def random_blocks(queries, keys, offset, has_list, block, batch=1, cap=CAP, seed=0):
    """A `BlockList` of random blocks that some row sees, the rows' own included."""
    generator = torch.Generator().manual_seed(seed)
    rows, capacity = list_shape(queries, keys, block, cap)
    shape = (batch, sum(has_list), int(rows), -(-keys // block))
    kept = torch.rand(shape, generator=generator) < 0.4
    first = torch.arange(rows)[:, None] * block + offset
    start = torch.arange(shape[3]) * block
    own = (start + block > first) & (start <= first + block - 1)
    kept = (kept | own) & (start <= first + block - 1)
    return BlockList(*runs_of(kept, capacity), list_heads(has_list), block)


def empty_lists(batch, heads):
    """A `VisitList` that visits nothing."""
    counts = torch.zeros(batch, heads, dtype=torch.int32)
    runs = torch.zeros(batch, heads, 1, 2, dtype=torch.int32)
    columns = torch.zeros(batch, heads, 1, dtype=torch.int32)
    return VisitList(runs, counts, columns, counts)
