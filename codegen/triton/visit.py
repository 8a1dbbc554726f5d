"""Run attention over visit lists on Triton."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from graphopt.codegen.block_lists import BlockLists
from graphopt.codegen.predicates import BLOCK
from graphopt.codegen.targets import Tile
from graphopt.codegen.triton.attention import (
    attention_spec,
    load,
    on_device,
    require_runnable,
    supports,
    table_argument,
)
from graphopt.codegen.triton.spec import VISIT_LIST, AttentionSpec


def launch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor | None,
    lists: Sequence[torch.Tensor],
    dense_rows: Sequence[int],
    query_offset: int,
    scale: float,
    softcap: float,
    blocks: BlockLists | None = None,
) -> torch.Tensor:
    """Run the kernel; shapes and arguments as `graphopt.ops.visit`.

    Returns a contiguous [B, Hq, Sq, Dv]. Raises KernelError for a dtype or a device
    that has no kernel.
    """
    require_runnable(query)
    spec = attention_spec(
        query, key, value, key_mask, VISIT_LIST, (dense_rows,), softcap
    )
    given = [t.contiguous() for t in lists]
    if blocks is not None:
        spec = replace(spec, block=blocks[3])
        given += [t.contiguous() for t in blocks[:2]]
        given.append(on_device(blocks[2], query.device))
    out = query.new_empty((*query.shape[:3], value.shape[-1]))
    if out.numel() == 0:
        return out
    if scale <= 0:
        # The kernel takes the row's maximum before it scales.
        query, scale = query * scale, 1.0
    mask = [] if key_mask is None else [key_mask]
    rows = table_argument(spec, dense_rows, query)
    cap = [softcap] if softcap else []
    tile = visit_tile(spec)
    with torch.cuda.device_of(query):
        load(spec).launch(
            query, key, value, *mask, out, *given, rows, query_offset, scale, *cap,
            tile.block_m, tile.block_n, **tile.options(),
        )  # fmt: skip
    return out


def visit_tile(spec: AttentionSpec) -> Tile:
    """Return the tile; a list speaks of blocks of 64 rows, so none is higher.

    The widest that spill on no target (tests/codegen/triton/test_visit.py).
    """
    width = max(spec.head_dim, spec.value_dim)
    if spec.dtype == torch.float32:
        return Tile(16, 16, 4, 1)
    if width <= 128:
        return Tile(BLOCK, 32, 4, 2)
    return Tile(BLOCK, 16, 8, 2)


__all__ = ["launch", "supports", "visit_tile"]
