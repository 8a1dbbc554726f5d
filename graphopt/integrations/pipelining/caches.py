"""The part of a cache that one stage of a pipeline keeps."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from graphopt.integrations.pipelining.cut import bounds
from graphopt.runtime.cache import Cache


def stage_layers(layers: int, stages: int, stage: int) -> range:
    """Return the layers of a stage."""
    firsts = [*bounds(layers, stages), layers]
    return range(firsts[stage], firsts[stage + 1])


def stage_cache(config: Any, model: Any, layers: range, **options: Any) -> Cache:
    """Return the cache of a request for the stage that runs ``layers``.

    It is `graphopt.Cache.from_config`, with the neurons of these layers alone: a stage
    chooses none in others, and what is not chosen is never to be computed with.
    """
    cache = Cache.from_config(config, model, **options)
    if cache.neurons is not None:
        kept = cache.neurons.layers.items()
        cache.neurons.layers = {i: held for i, held in kept if i in layers}
    return cache


def keep_layers(cache: Cache, layers: range) -> None:
    """Give up the pages of other layers; they were made by a call that needed sizes."""
    others = [x for i, x in enumerate(cache.layers) if i not in layers]
    made = [layer for layer in others if layer.is_initialized]
    give_up([tensor for layer in made for tensor in layer.tensors()])


def give_up(tensors: list[Tensor]) -> int:
    """Free the memory of tensors that nothing reads; return the bytes.

    They keep sizes, dtype and device, which is what compiled code checks of them.
    """
    freed = 0
    for tensor in tensors:
        storage = tensor.untyped_storage()
        if storage.resizable() and storage.nbytes():
            freed += storage.nbytes()
            storage.resize_(0)
    return freed
