"""``graphopt::select_vertical_slash``: visit lists from the last queries' attention.

MInference (Jiang et al. 2024, section 3.2, vertical-slash heads): the softmax of the
last 64 queries over all keys estimates which columns and which diagonals hold the mass
of the whole matrix. Sinks and near diagonals are always kept. Shapes: query
[B, Hq, Sq, D], key [B, Hkv, Skv, D], ``key_mask`` [B, Skv] or None; the tables hold one
value for all query heads or one each:

- ``sink``: first columns kept, ``window``: nearest distances kept (tokens);
- ``vertical``: further columns, ``slash``: further diagonals, by estimated mass.

Returns the four tensors of a `graphopt.ops.visit_list.VisitList`. Everything is batched
over heads and stays on the device; below ``min_tokens`` keys the lists are empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from graphopt.ops.estimate import last_positions, last_queries_mass
from graphopt.ops.visit_list import VisitList, from_distances, sorted_places

_SCHEMA = (
    "select_vertical_slash(Tensor query, Tensor key, Tensor? key_mask, int[] sink, "
    "int[] window, int[] vertical, int[] slash, SymInt query_offset, "
    "float? scale=None, float softcap=0.0, SymInt min_tokens=0) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)

_library = torch.library.Library("graphopt", "FRAGMENT")
_library.define(_SCHEMA)


def select_vertical_slash(
    query: Tensor,
    key: Tensor,
    key_mask: Tensor | None,
    sink: Sequence[int],
    window: Sequence[int],
    vertical: Sequence[int],
    slash: Sequence[int],
    query_offset: int = 0,
    scale: float | None = None,
    softcap: float = 0.0,
    min_tokens: int = 0,
) -> VisitList:
    """Call ``graphopt::select_vertical_slash``; see the module."""
    return VisitList(
        *torch.ops.graphopt.select_vertical_slash(
            query, key, key_mask, sink, window, vertical, slash, query_offset, scale,
            softcap, min_tokens,
        )
    )  # fmt: skip


def _capacities(
    sink: Sequence[int], vertical: Sequence[int], slash: Sequence[int]
) -> tuple[int, int]:
    return max(slash) + 1, max(max(sink) + max(vertical), 1)


def _keep_nothing(*tables: Sequence[int]) -> bool:
    """Tell whether every head visits by other means, a block list."""
    return not any(map(any, tables))


def _empty(query: Tensor, runs: int, columns: int) -> VisitList:
    shape = query.shape[:2]

    def new(*sizes: int) -> Tensor:
        return query.new_zeros((*shape, *sizes), dtype=torch.int32)

    return VisitList(new(runs, 2), new(), new(columns), new())


@torch.library.register_fake("graphopt::select_vertical_slash", lib=_library)
def _fake(
    query: Tensor,
    key: Tensor,
    key_mask: Tensor | None,
    sink: Sequence[int],
    window: Sequence[int],
    vertical: Sequence[int],
    slash: Sequence[int],
    *rest: Any,
    **options: Any,
) -> tuple[Tensor, ...]:
    for table in (sink, window, vertical, slash):
        if len(table) not in (1, query.shape[1]):
            raise ValueError(
                f"graphopt.select_vertical_slash: a table of {len(table)} values for "
                f"{query.shape[1]} heads"
            )
    return tuple(_empty(query, *_capacities(sink, vertical, slash)))


def select_reference(
    query: Tensor,
    key: Tensor,
    key_mask: Tensor | None,
    sink: Sequence[int],
    window: Sequence[int],
    vertical: Sequence[int],
    slash: Sequence[int],
    query_offset: int,
    scale: float | None = None,
    softcap: float = 0.0,
    min_tokens: int = 0,
) -> tuple[Tensor, ...]:
    """Select in plain ATen, on any device; arguments as in the module."""
    run_capacity, column_capacity = _capacities(sink, vertical, slash)
    if key.shape[2] < min_tokens or _keep_nothing(sink, window, vertical, slash):
        return tuple(_empty(query, run_capacity, column_capacity))
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    columns, distances = last_queries_mass(
        query, key, key_mask, query_offset, scale, softcap
    )
    kept_columns = _keep(columns, sink, vertical)
    kept_distances = _keep(distances, window, slash)
    runs, run_count = from_distances(kept_distances, run_capacity)
    places, column_count = sorted_places(kept_columns, column_capacity)
    return runs, run_count, places, column_count


@torch.library.impl(_library, "select_vertical_slash", "CUDA")
def _cuda(
    query: Tensor,
    key: Tensor,
    key_mask: Tensor | None,
    sink: Sequence[int],
    window: Sequence[int],
    vertical: Sequence[int],
    slash: Sequence[int],
    query_offset: int,
    scale: float | None = None,
    softcap: float = 0.0,
    min_tokens: int = 0,
) -> tuple[Tensor, ...]:
    from graphopt.codegen.triton import select as triton_select

    tables = (sink, window, vertical, slash)
    if not triton_select.supports(query.dtype):
        rest = (query_offset, scale, softcap, min_tokens)
        return select_reference(query, key, key_mask, *tables, *rest)
    capacities = _capacities(sink, vertical, slash)
    if key.shape[2] < min_tokens or _keep_nothing(*tables) or query.numel() == 0:
        return tuple(_empty(query, *capacities))
    _check_positions(query, key, query_offset)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    return triton_select.launch(
        query, key, key_mask, tables, capacities, query_offset, scale, softcap
    )


def _check_positions(query: Tensor, key: Tensor, query_offset: int) -> None:
    if query_offset + query.shape[2] > key.shape[2]:
        raise ValueError("graphopt.select_vertical_slash: queries beyond the last key")


@torch.library.impl(_library, "select_vertical_slash", "CPU")
def _cpu(
    query: Tensor,
    key: Tensor,
    key_mask: Tensor | None,
    sink: Sequence[int],
    window: Sequence[int],
    vertical: Sequence[int],
    slash: Sequence[int],
    query_offset: int,
    scale: float | None = None,
    softcap: float = 0.0,
    min_tokens: int = 0,
) -> tuple[Tensor, ...]:
    from graphopt.codegen.cpp import select as cpp

    tables = (sink, window, vertical, slash)
    if not cpp.supports(query.dtype):
        rest = (query_offset, scale, softcap, min_tokens)
        return select_reference(query, key, key_mask, *tables, *rest)
    lists = _empty(query, *_capacities(sink, vertical, slash))
    if key.shape[2] < min_tokens or _keep_nothing(*tables):
        return tuple(lists)
    _check_positions(query, key, query_offset)
    positions = last_positions(query, key_mask, query_offset)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    first, count = positions[:, 0] - query_offset, positions.shape[1]
    cpp.launch(
        query, key, key_mask, first.contiguous(), count, tables, lists, query_offset,
        scale, softcap,
    )  # fmt: skip
    return tuple(lists)


def _keep(mass: Tensor, first: Sequence[int], count: Sequence[int]) -> Tensor:
    """Return the mask [B, Hq, N] of the first places and the heaviest others.

    Places without any mass are never kept for their mass: a short prompt has fewer
    columns than ``count``.
    """
    place = torch.arange(mass.shape[-1], device=mass.device)
    always = place < _column(first, mass)
    rest = mass.masked_fill(always, 0.0)
    best = rest.topk(min(max(count), mass.shape[-1]), dim=-1)
    rank = torch.arange(best.values.shape[-1], device=mass.device)
    wanted = (best.values > 0) & (rank < _column(count, mass))
    kept = torch.zeros_like(mass, dtype=torch.bool)
    return always | kept.scatter(-1, best.indices, wanted)


def _column(table: Sequence[int], like: Tensor) -> Tensor:
    """Return a table as [H or 1, 1], to broadcast over [B, H, N]."""
    return torch.tensor(list(table), device=like.device)[:, None]
