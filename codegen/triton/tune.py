"""Choose the tile of a kernel: measured once per spec, device and length, and kept."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch

from graphopt.codegen.cache import cache_dir, digest, write_atomic
from graphopt.codegen.targets import Tile, present, tiles
from graphopt.codegen.triton.emit import emit
from graphopt.codegen.triton.spec import AttentionSpec

_chosen: dict[str, Tile] = {}


def choose_tile(
    spec: AttentionSpec,
    kernel: Callable[..., None],
    arguments: Sequence[object],
    query: torch.Tensor,
    kv_len: int,
) -> Tile:
    """Return the fastest tile for these arguments; the table's first if untunable.

    Lengths share a choice within a factor of two. A choice is stored in the cache
    directory, so later processes neither measure nor compile the losers.
    """
    target = present(query.device)
    width = max(spec.head_dim, spec.value_dim)
    candidates = tiles(target, width, spec.dtype, query.shape[2])
    if len(candidates) == 1 or not _can_measure(query):
        return candidates[0]
    name = torch.cuda.get_device_name(query.device)
    rows, keys = query.shape[2].bit_length(), kv_len.bit_length()
    identity = (emit(spec), name, rows, keys, [str(tile) for tile in candidates])
    label = digest(repr(identity).encode())[:32]
    if label not in _chosen:
        _chosen[label] = _stored(label, candidates) or _fastest(
            label, kernel, arguments, candidates
        )
    return _chosen[label]


def _can_measure(query: torch.Tensor) -> bool:
    """A stream that records a CUDA graph cannot be timed."""
    return query.is_cuda and not torch.cuda.is_current_stream_capturing()


def _stored(label: str, candidates: Sequence[Tile]) -> Tile | None:
    path = cache_dir() / "tiles" / f"{label}.json"
    try:
        tile = Tile(**json.loads(path.read_text())["tile"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return tile if tile in candidates else None


def _fastest(
    label: str,
    kernel: Callable[..., None],
    arguments: Sequence[object],
    candidates: Sequence[Tile],
) -> Tile:
    times = {tile: _measure(kernel, arguments, tile) for tile in candidates}
    best = min(candidates, key=lambda tile: times[tile])
    folder = cache_dir() / "tiles"
    folder.mkdir(mode=0o700, exist_ok=True)
    record = {
        "tile": vars(best),
        "milliseconds": {str(t): ms for t, ms in times.items()},
    }
    write_atomic(folder / f"{label}.json", json.dumps(record, indent=1).encode())
    return best


def _measure(
    kernel: Callable[..., None], arguments: Sequence[object], tile: Tile
) -> float:
    """Return milliseconds, infinite for a tile that this device has no room for."""
    import triton

    def run() -> None:
        kernel(*arguments, tile.block_m, tile.block_n, **tile.options())

    try:
        measured: Any = triton.testing.do_bench(run, 5, 20, return_mode="median")
    except triton.runtime.errors.OutOfResources:
        return float("inf")
    return float(measured)
