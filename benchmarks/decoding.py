"""What benchmarks of decoding share: cases, and sides that step over filled caches.

Every side of a comparison gets the same prompt as the keys and values that the dense
model computed, so that rows differ by what they read and how, and not by their past.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from graphopt.runtime.cache import Cache

Past = list[tuple[torch.Tensor, torch.Tensor]]  # keys and values of each layer


@dataclass(frozen=True)
class Case:
    """A row: graphopt's ``config`` and what its cache keeps.

    ``paged``: decode over graphopt.Cache; a DynamicCache otherwise. ``together``:
    layers of a compiled piece.
    """

    name: str
    config: str
    kv_dtype: Any = None
    statistics: Any = "spread"
    paged: bool = True
    together: int = 1

    def compiled(self, model: Any) -> Any:
        """Return an entry into ``model`` of this case's own."""
        options: Any = {"config": self.config, "outline": self.together}
        return torch.compile(model, backend="graphopt", dynamic=True, options=options)

    def cache(self, max_tokens: int) -> Any:
        """Return an empty cache with room for ``max_tokens``."""
        from transformers import DynamicCache

        if not self.paged:
            return DynamicCache()
        return Cache(
            max_tokens=max_tokens, kv_dtype=self.kv_dtype, statistics=self.statistics
        )


@dataclass
class Side:
    """A model and the cache that it decodes with."""

    model: Callable[..., Any]
    cache: Any

    @torch.no_grad()
    def run(self, tokens: torch.Tensor) -> torch.Tensor:
        """Feed ``tokens`` [1, S] one by one, then forget them; logits [S, vocab]."""
        before = int(self.cache.get_seq_length())
        logits = [self._step(token) for token in tokens[0]]
        if isinstance(self.cache.get_seq_length(), int):
            self.cache.crop(-len(logits))
        else:
            for layer in self.cache.layers:
                layer.cumulative_length.fill_(before)
        return torch.stack(logits)

    def _step(self, token: torch.Tensor) -> torch.Tensor:
        output = self.model(token.view(1, 1), past_key_values=self.cache)
        return output.logits[0, -1].float()


@torch.no_grad()
def past(model: Any, prompt: torch.Tensor) -> Past:
    """Return the keys and values of ``prompt`` [1, S] as ``model`` computes them."""
    from transformers import DynamicCache

    cache = DynamicCache()
    model(prompt, past_key_values=cache, logits_to_keep=1)
    return [(layer.keys, layer.values) for layer in cache.layers]


def fill(caches: list[Any], prompt: Past) -> None:
    """Give every cache the same prompt."""
    for cache in caches:
        for index, (key, value) in enumerate(prompt):
            cache.update(key, value, index)


def cache_bytes(cache: Any) -> int:
    """Return the bytes of keys, values and what is kept about them."""
    if isinstance(cache, Cache):
        return cache.nbytes
    return sum(t.nbytes for x in cache.layers for t in (x.keys, x.values))
