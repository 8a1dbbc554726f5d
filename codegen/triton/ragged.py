"""Attention of ragged batches to their pages on Triton."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from graphopt.codegen.cache import load_python
from graphopt.codegen.pages import PAGE, width
from graphopt.codegen.predicates import predicate
from graphopt.codegen.targets import Tile
from graphopt.codegen.triton.attention import on_device, require_runnable, supports
from graphopt.codegen.triton.interpreter import is_interpreted, repair_bfloat16_dot
from graphopt.codegen.triton.pages_append import require_contiguous
from graphopt.codegen.triton.pages_spec import KINDS, padded
from graphopt.codegen.triton.ragged_emit import emit_ragged
from graphopt.codegen.triton.ragged_spec import LEAST_KEYS, RaggedSpec

# As many as `graphopt.codegen.triton.pages_attention` starts, and for its reasons.
_PROGRAMS = 512
_MOST_STACKED = 128  # query heads in the rows of one tile


@cache
def load(spec: RaggedSpec) -> ModuleType:
    """Write the kernels' file to the cache directory and import it."""
    if is_interpreted():
        repair_bfloat16_dot()
    return load_python(spec.name, emit_ragged(spec))


def launch(
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
    scale: float,
    softcap: float,
) -> Tensor:
    """Run the kernels; shapes and arguments as `graphopt.ops.pages.ragged`.

    Two launches: all tiles, and the sums of what was split. Grids and scratch memory
    depend on the shapes of the tensors alone and never on lengths: a CUDA graph of a
    step can be replayed for other rows (after one call outside of a capture, in which
    kernels are compiled and tables made). How many parts a tile has is decided by its
    own keys on the device, so that a long decode is split beside a prefill too.

    Raises KernelError for a dtype or a device that has no kernel, and for tensors of
    the cache that are not contiguous.
    """
    require_runnable(query)
    pools = [
        t for t in (key_pages, value_pages, key_scales, value_scales) if t is not None
    ]
    require_contiguous([*pools, starts, past, table])
    used = {
        n: v for n, v in (("sink", sink), ("window", window)) if n in _used(pattern)
    }
    tables = [_by_head(values, query.shape[1]) for values in used.values()]
    spec = ragged_spec(query, pools, pattern, tables, softcap)
    out = query.new_empty((*query.shape[:3], spec.value_dim))
    if out.numel() == 0:
        return out
    tile = ragged_tile(spec, query.shape[2], table.shape[0])
    values = [_argument(spec, values, query.device) for values in tables]
    cap = [softcap] if spec.has_softcap else []
    with torch.cuda.device_of(query):
        load(spec).launch(
            query, *pools, starts, past, table, out, *values, scale, *cap,
            *splits(spec, tile, query.shape, table.shape), padded(spec.stacked),
            tile.block_m, tile.block_n, **tile.options(),
        )  # fmt: skip
    return out


def _used(pattern: str) -> tuple[str, ...]:
    return tuple(str(symbol.name) for symbol in predicate(pattern).parameters)


def _by_head(values: Sequence[int], heads: int) -> tuple[int, ...]:
    return tuple((list(values) * heads)[:heads])


def ragged_spec(
    query: Tensor,
    pools: Sequence[Tensor],
    pattern: str,
    tables: Sequence[tuple[int, ...]],
    softcap: float,
) -> RaggedSpec:
    """Return the spec of a call; ``tables`` are those that the pattern has, by head."""
    heads = query.shape[1]
    group = heads // pools[0].shape[0]
    firsts = [h // group * group for h in range(heads)]
    alike = all([table[h] for h in firsts] == list(table) for table in tables)
    return RaggedSpec(
        dtype=query.dtype,
        head_dim=query.shape[-1],
        value_dim=width(pools[1]),
        kind=KINDS.get(pools[0].dtype, ""),
        pattern=pattern,
        group=group,
        stacked=group if alike and group <= _MOST_STACKED else 1,
        has_softcap=softcap != 0,
        per_head=any(len(set(table)) > 1 for table in tables),
    )


def _argument(
    spec: RaggedSpec, table: tuple[int, ...], device: torch.device
) -> int | Tensor:
    """Return one number where all heads agree, else one of each program's heads."""
    return on_device(table[:: spec.stacked], device) if spec.per_head else table[0]


def ragged_tile(spec: RaggedSpec, tokens: int, rows: int) -> Tile:
    """Return the tile of ``attend``; a short one where rows have one token or none.

    The widest that spill on no target (tests/codegen/triton/test_ragged.py).
    """
    least = padded(spec.stacked)
    is_narrow = max(padded(spec.head_dim), padded(spec.value_dim)) <= 128
    is_short = tokens <= rows
    if spec.dtype == torch.float32:
        rows_of = 32 if is_narrow and not is_short else least
        return Tile(max(rows_of, least), 16, 8 if rows_of > 16 else 4, 1)
    keys = PAGE if is_narrow else PAGE // 2
    # The two halves of four bits are two operands, and two sums.
    keys = keys // 2 if spec.kind == "int4" else keys
    if is_short:
        return Tile(least, keys, 4 if least <= 64 else 8, 3)
    return Tile(max(64, least), keys, 4 if is_narrow and least <= 64 else 8, 2)


def splits(
    spec: RaggedSpec, tile: Tile, query: Sequence[int], table: Sequence[int]
) -> tuple[int, int]:
    """Return the most parts of a short row and of a tile for these shapes."""
    rows, pages = table
    heads = query[1] // spec.stacked
    tiles = query[2] // (tile.block_m // spec.stacked) + rows + 1
    most = max(pages * PAGE // LEAST_KEYS, 1)
    of_rows = min(max(_PROGRAMS // max(rows * heads, 1), 1), most)
    return of_rows, min(max(_PROGRAMS // (tiles * heads), 1), of_rows)


__all__ = ["launch", "load", "ragged_spec", "ragged_tile", "splits", "supports"]
