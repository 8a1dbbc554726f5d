"""Vertical-slash selection on Triton: emit the kernels of a spec, import, launch.

Five launches at most, whatever the batch, the heads and the tables; nothing of size
Sq x Skv, no sort, nothing that waits for the device, and no copy from the host once a
table was seen.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from graphopt.codegen.cache import load_python
from graphopt.codegen.triton.attention import on_device, require_runnable, supports
from graphopt.codegen.triton.interpreter import is_interpreted, repair_bfloat16_dot
from graphopt.codegen.triton.select_emit import emit_choice, emit_estimate
from graphopt.codegen.triton.select_spec import (
    CHUNK,
    ROWS,
    EstimateSpec,
    estimate_tile,
)

CHOICE_OPTIONS = {"num_warps": 8, "num_stages": 2}

_MOST = 2**31 - 1


@cache
def load_estimate(spec: EstimateSpec) -> ModuleType:
    """Write the file of the passes over the keys to the cache and import it."""
    if is_interpreted():
        repair_bfloat16_dot()
    return load_python(spec.name, emit_estimate(spec))


@cache
def load_choice(has_key_mask: bool) -> ModuleType:
    """Write the file of the choice to the cache directory and import it."""
    stem = "choose_places" + "_mask" * has_key_mask
    return load_python(stem, emit_choice(has_key_mask))


def launch(
    query: Tensor,
    key: Tensor,
    key_mask: Tensor | None,
    tables: Sequence[Sequence[int]],
    capacities: tuple[int, int],
    query_offset: int,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the tensors of a `graphopt.ops.visit_list.VisitList`.

    Shapes as `graphopt.ops.selection`; ``tables``: sink, window, vertical, slash, one
    value or one a head; ``capacities``: of runs and of columns. Any strides will do.
    Raises KernelError for a dtype or a device that has no kernel.
    """
    require_runnable(query)
    spec = EstimateSpec(
        query.dtype,
        query.shape[-1],
        query.shape[1] // key.shape[1],
        key_mask is not None,
        softcap > 0,
    )
    table = _table(tables, query)
    with torch.cuda.device_of(query):
        sums, last = _estimate(
            spec, query, key, key_mask, table, query_offset, scale, softcap
        )
        lists = _new_lists(query, *capacities)
        load_choice(spec.has_key_mask).launch(
            sums, last, table, *lists, **CHOICE_OPTIONS
        )
    return lists


def _table(tables: Sequence[Sequence[int]], query: Tensor) -> Tensor:
    """Return int32 [4, Hq] on the device, made at the first call and kept."""
    heads = query.shape[1]
    rows = (list(table) * heads for table in tables)
    values = [min(value, _MOST) for row in rows for value in row[:heads]]
    return on_device(tuple(values), query.device)


def _estimate(
    spec: EstimateSpec,
    query: Tensor,
    key: Tensor,
    key_mask: Tensor | None,
    table: Tensor,
    query_offset: int,
    scale: float,
    softcap: float,
) -> tuple[Tensor, Tensor | int]:
    """Return the masses [2, B * Hq, Skv] and the last positions, see the template."""
    batch, heads, query_len, _ = query.shape
    lists, kv_len = batch * heads, key.shape[2]

    def new(*shape: int) -> Tensor:
        return query.new_empty(shape, dtype=torch.float32)

    last: Tensor | int = query_offset + query_len - 1
    if key_mask is not None:
        last = query.new_empty(batch, dtype=torch.int32)
    sums = new(2, lists, kv_len)
    scratch = new(2, lists, -(-kv_len // CHUNK), ROWS), new(2, lists, ROWS)
    mask = [] if key_mask is None else [key_mask]
    cap = [softcap] if spec.has_softcap else []
    tile = estimate_tile(spec)
    load_estimate(spec).launch(
        query, key, *mask, last, table, *scratch, sums, query_offset, scale, *cap,
        tile.block_n, **tile.options(),
    )  # fmt: skip
    return sums, last


def _new_lists(
    query: Tensor, runs: int, columns: int
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    batch, heads = query.shape[:2]

    def new(*sizes: int) -> Tensor:
        return query.new_empty((batch, heads, *sizes), dtype=torch.int32)

    return new(runs, 2), new(), new(columns), new()


__all__ = ["launch", "load_choice", "load_estimate", "supports"]
