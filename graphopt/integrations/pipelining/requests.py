"""Requests with caches of their own through a pipeline: one a micro-batch.

Passes that need the whole prompt, or a `graphopt.Cache`, run here: sparse attention,
page selection, neuron masks, dropped tokens.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from graphopt.errors import ModelError
from graphopt.integrations.pipelining.agreement import agree
from graphopt.integrations.pipelining.caches import (
    keep_layers,
    stage_cache,
    stage_layers,
)
from graphopt.integrations.pipelining.placing import place
from graphopt.integrations.pipelining.schedule import Pipeline
from graphopt.integrations.pipelining.staged import StagedModel
from graphopt.learngene.stack import find_stack
from graphopt.runtime.cache import Cache


class RequestPipeline:
    """Runs prompts and decoding steps of requests on the stages of a pipeline.

    Each stage keeps a `graphopt.Cache` a request, made for ``config``, of which it
    fills its own layers. ``max_tokens``: room in each, made once; without it caches
    grow, and a stage keeps room for all layers. Calls of one step have the same number
    of tokens. Every rank calls it alike.

    ``device``: where this rank's stages are to run. Given one, the model is moved there
    without the layers of other stages, whose weights are given up (``released`` bytes).

    Raises ModelError for a model that cannot be cut at its layers, RanksError where
    ranks were given different things.
    """

    def __init__(
        self,
        model: nn.Module,
        group: dist.ProcessGroup | None = None,
        *,
        config: Any = None,
        max_tokens: int | None = None,
        per_rank: int = 1,
        host: str = "inductor",
        device: torch.device | str | None = None,
    ) -> None:
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        self.stages = ranks * per_rank
        said = {"the stages": self.stages, "max_tokens": max_tokens}
        agree(group, model, config, **said)
        self._model, self._config, self._max_tokens = model, config, max_tokens
        self._layers = len(find_stack(model))
        own = range(rank, self.stages, ranks)
        self._kept = {s: stage_layers(self._layers, self.stages, s) for s in own}
        self.released = 0
        if device is not None:
            self.released = place(model, self._kept.values(), device, config)
        options = {"config": config}
        self.staged = StagedModel(
            _Call(model), self.stages, own, options, host, layers=self._layers
        )
        self._pipeline = Pipeline(self.staged, group, per_rank)
        self._caches: dict[Hashable, dict[int, Cache]] = {}

    def run(self, calls: Sequence[tuple[Hashable, Sequence[int]]]) -> list[Tensor]:
        """Run one step: (request, its next tokens) a micro-batch.

        Returns the logits [V] behind each one's last token. A request that is new
        begins with an empty cache. Raises ModelError where the calls exchange tensors
        of different sizes, or one request is in two of them.
        """
        if len({request for request, _ in calls}) < len(calls):
            raise ModelError("pipelining: a request is in two micro-batches of a step")
        made = [self._call(request, tokens) for request, tokens in calls]
        new = [request for request, _ in calls if self._is_empty(request)]
        buckets = [self._pipeline.measure(call) for call in made]
        if len(set(buckets)) > 1:
            lengths = sorted({len(tokens) for _, tokens in calls})
            raise ModelError(
                f"pipelining: calls of {lengths} tokens in one step, whose stages "
                "exchange tensors of different sizes; run those of one length together"
            )
        logits = self._pipeline.step(buckets[0], made)
        self._give_up_pages(new)
        return list(logits[:, -1])

    def _is_empty(self, request: Hashable) -> bool:
        found = self._caches[request].values()
        return not any(cache.get_seq_length() for cache in found)

    def _give_up_pages(self, requests: Iterable[Hashable]) -> None:
        """Give up the pages that a first call made for layers of other stages.

        Not where caches grow, which copies them.
        """
        for request in requests if self._max_tokens is not None else ():
            for stage, cache in self._caches[request].items():
                keep_layers(cache, self._kept[stage])

    def forget(self, request: Hashable) -> None:
        """Drop a request's caches."""
        self._caches.pop(request, None)

    def _call(self, request: Hashable, tokens: Sequence[int]) -> _RequestCall:
        if request not in self._caches:
            self._caches[request] = {s: self._cache(s) for s in self.staged.own}
        device = next(self._model.parameters()).device
        ids = torch.tensor([list(tokens)], device=device)
        return _RequestCall(ids, self._caches[request])

    def _cache(self, stage: int) -> Cache:
        room = {} if self._max_tokens is None else {"max_tokens": self._max_tokens}
        return stage_cache(self._config, self._model, self._kept[stage], **room)


@dataclass(frozen=True)
class _RequestCall:
    """The next tokens [1, S] of a request, and each stage's part of its cache."""

    ids: Tensor
    caches: dict[int, Cache]

    def arguments(self, stage: int) -> tuple[Any, ...]:
        """Return the call of a stage."""
        return self.ids, self.caches[stage]


class _Call(nn.Module):
    """The model as a request calls it; compiled apart from its own forward."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor, cache: Cache) -> Tensor:
        """Return the logits [1, 1, V] behind ids [1, S]."""
        output = self.model(
            input_ids=ids, past_key_values=cache, use_cache=True, logits_to_keep=1
        )
        logits: Tensor = output.logits
        return logits
