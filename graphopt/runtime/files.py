"""A cache on disk: one safetensors file with the pages that hold tokens."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from graphopt.codegen.pages import width
from graphopt.errors import ConfigError
from graphopt.ops.pages import pages_of
from graphopt.runtime.layer import PagedLayer
from graphopt.runtime.pool import POOL
from graphopt.runtime.rows import grown

if TYPE_CHECKING:
    from graphopt.runtime.cache import Cache

_FORMAT = "graphopt-cache-1"
_OPTIONS = (
    *("max_tokens", "kv_dtype", "statistics"),
    *("streaming", "sink", "local", "dropping", "hidden_size"),
)
_HIDDEN = ("states", "depth", "positions")


def save(cache: Cache, path: str | Path) -> None:
    """Write ``cache`` to ``path``; raises ConfigError for one that is empty."""
    rows = cache.rows
    if rows.lengths is None or rows.table is None or not rows.tokens:
        raise ConfigError("Cache.save: the cache holds no tokens yet")
    if cache.neurons is not None:
        raise ConfigError(
            "Cache.save: the neurons that 'neuron-mask' chose are not written; save a "
            "cache without them, which decodes densely"
        )
    used = rows.table[:, : pages_of(rows.tokens)].long()
    tensors = {"lengths": rows.lengths}
    for index, layer in enumerate(cache.layers):
        for name, pool, is_whole in _pools(layer):
            kept = pool if is_whole else pool[:, used].flatten(1, 2)
            tensors[f"{index}.{name}"] = kept.contiguous()
    if cache.hidden is not None:
        for name, tensor in zip(_HIDDEN, cache.hidden.tensors(), strict=True):
            tensors[f"hidden.{name}"] = tensor[:, : rows.tokens].contiguous()
    options = {name: getattr(cache, name) for name in _OPTIONS}
    about = {"format": _FORMAT, "layers": len(cache.layers), "options": options}
    dtypes = [str(layer.dtype).removeprefix("torch.") for layer in cache.layers]
    text = json.dumps({**about, "dtypes": dtypes})
    save_file(tensors, path, {"graphopt": text})


def load(kind: type[Cache], path: str | Path, device: str | torch.device) -> Cache:
    """Read a cache that `save` wrote; raises ConfigError where it cannot."""
    try:
        with safe_open(path, "pt", device=str(device)) as file:
            about = json.loads((file.metadata() or {}).get("graphopt", "{}"))
            if about.get("format") != _FORMAT:
                raise ConfigError(f"{path}: not a graphopt cache ({_FORMAT})")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{path}: cannot read the cache: {error}") from None
    cache = kind(**about["options"])
    lengths = tensors["lengths"]
    _fill_rows(cache, lengths)
    for index, dtype in enumerate(about["dtypes"]):
        layer = cache.new_layer(index)
        cache.layers.append(layer)
        _fill(layer, index, tensors, getattr(torch, dtype), len(lengths))
    if cache.hidden_size is not None:
        cache.add_states(tensors["hidden.states"])
        _fill_states(cache, tensors)
    return cache


def _fill_states(cache: Cache, tensors: dict[str, Tensor]) -> None:
    assert cache.hidden is not None
    for name, tensor in zip(_HIDDEN, cache.hidden.tensors(), strict=True):
        stored = tensors[f"hidden.{name}"]
        tensor[:, : stored.shape[1]].copy_(stored)


def _fill_rows(cache: Cache, lengths: Tensor) -> None:
    tokens = lengths.tolist()
    cache.allocate(len(tokens), max(tokens), lengths.device)
    cache.rows.set_lengths(tokens)
    cache.rows.ragged = len(set(tokens)) > 1


def _fill(
    layer: PagedLayer, index: int, tensors: dict[str, Tensor], dtype: Any, batch: int
) -> None:
    def shaped(name: str) -> Tensor:
        pool = tensors[f"{index}.full.{name}"]
        heads = pool.shape[0] + len(layer.rings.heads)
        return pool.new_empty((batch, heads, 0, width(pool)), dtype=dtype)

    layer.lazy_initialization(shaped("keys"), shaped("values"))
    assert layer.rows.table is not None
    pages = layer.rows.table.shape[1]
    for name, pool, is_whole in list(_pools(layer)):
        stored = tensors[f"{index}.{name}"]
        pool.copy_(stored if is_whole else grown(stored, batch, pages))


def _pools(layer: PagedLayer) -> Iterator[tuple[str, Tensor, bool]]:
    """Yield name, tensor, and whether it is kept whole, not the pages in use only."""
    for part, pool in (("full", layer.full), ("ring", layer.ring)):
        for name in POOL if pool is not None else ():
            tensor = getattr(pool, name)
            if tensor is not None:
                yield f"{part}.{name}", tensor, part == "ring"
    yield "statistics", layer.statistics, False
    if layer.lengths is not None:
        yield "lengths", layer.lengths, True


__all__ = ["load", "save"]
