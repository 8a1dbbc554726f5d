"""SARATHI's micro-batches, chunks and piggybacked decodes, through a pipeline.

Source: SARATHI (arXiv 2308.16369), section 4: micro-batches of equal numbers of tokens
leave no bubbles between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from graphopt.config import load_config
from graphopt.errors import ConfigError, ModelError
from graphopt.integrations.pipelining.agreement import agree
from graphopt.integrations.pipelining.caches import give_up, stage_layers
from graphopt.integrations.pipelining.placing import place
from graphopt.integrations.pipelining.schedule import Pipeline
from graphopt.integrations.pipelining.staged import StagedModel
from graphopt.ops.pages import PAGE, pages_of
from graphopt.report import CompileReport
from graphopt.runtime.engine.batch import Piece
from graphopt.runtime.engine.compiled import Step, laid_flat, layer_shapes
from graphopt.runtime.engine.ragged_cache import RaggedCache

_TRACED = 7  # tokens of the call that is captured: a size of nothing else


class RaggedPipeline:
    """Runs micro-batches of `Piece`s on the stages of a pipeline, each with its pages.

    ``buckets``: the numbers of tokens that micro-batches are padded to; each has stage
    objects of its own over one module and cache. ``pages``: of 64 tokens, for the
    requests of all micro-batches; a stage keeps those of its own layers. At most
    ``rows`` requests run in a micro-batch, each of at most ``max_length`` tokens.
    ``config``: passes, as of `graphopt.compile`, that run after `ragged-batch`.
    ``device``: as of `RequestPipeline`.

    Every rank calls it alike, with the same model, config and micro-batches. Raises
    ConfigError for a model whose attention rows cannot share, ModelError for one that
    cannot be cut, RanksError where ranks were given different things.
    """

    page_size = PAGE

    def __init__(
        self,
        model: nn.Module,
        group: dist.ProcessGroup | None = None,
        *,
        config: Any = None,
        buckets: Sequence[int] = (64, 256),
        pages: int = 512,
        rows: int = 64,
        max_length: int | None = None,
        per_rank: int = 1,
        host: str = "inductor",
        device: torch.device | str | None = None,
    ) -> None:
        ranks, rank = dist.get_world_size(group), dist.get_rank(group)
        stages = ranks * per_rank
        self.pages, self.rows = pages, max(rows, 3)
        self.stages, self.ranks = stages, ranks
        self._buckets = sorted(buckets)
        self._name = type(model).__name__
        said = {"the buckets": tuple(self._buckets), "the stages": stages}
        said |= {"the pages": pages, "the rows": self.rows}
        agree(group, model, "" if config is None else config, **said)
        text = "" if config is None else load_config(config).text()
        options = {"config": ",".join(filter(None, ("ragged-batch", text)))}
        own = range(rank, stages, ranks)
        shapes = layer_shapes(model)
        kept = {stage: stage_layers(len(shapes), stages, stage) for stage in own}
        self.released = 0
        if device is not None:
            self.released = place(model, kept.values(), device, text)
        self.staged = StagedModel(Step(model), stages, own, options, host, self._check)
        weight = next(model.parameters())
        self._device = weight.device
        row_pages = min(pages, pages_of(max_length)) if max_length else pages
        self.caches = {
            stage: RaggedCache(
                shapes, pages, self.rows, row_pages, weight.dtype, weight.device
            )
            for stage in own
        }
        for stage, cache in self.caches.items():
            _keep(cache, kept[stage])
        self._pipeline = Pipeline(self.staged, group, per_rank)
        self._pipeline.open(
            "", self._call([Piece(0, (0,) * 7, 0, (0,), True)], _TRACED)
        )
        for bucket in self._buckets:
            self._pipeline.open(bucket, self._call([], bucket))

    def _check(self, report: CompileReport) -> None:
        record = report.records[0]
        if not record.changed:
            reasons = "; ".join(str(remark) for remark in record.remarks)
            raise ConfigError(
                f"pipelining: {self._name} cannot run batches of rows: {reasons}; "
                "give its requests caches of their own (`RequestPipeline`)"
            )

    def bucket(self, tokens: int) -> int:
        """Return the bucket for so many tokens; ModelError where none is so large."""
        for bucket in self._buckets:
            if tokens <= bucket:
                return bucket
        raise ModelError(
            f"pipelining: a micro-batch of {tokens} tokens, and the largest bucket has "
            f"{self._buckets[-1]}: make the chunks smaller, or give buckets that large"
        )

    def run(self, micro_batches: Sequence[Sequence[Piece]]) -> list[Tensor]:
        """Run one step; return the logits [pieces that sample, V] of each micro-batch.

        All micro-batches are padded to the bucket of the largest. A request may be in
        one of them only: its next token is known when the step is through.
        """
        self._check_pieces(micro_batches)
        tokens = [sum(len(p.tokens) for p in pieces) for pieces in micro_batches]
        bucket = self.bucket(max(tokens))
        calls = [self._call(pieces, bucket) for pieces in micro_batches]
        logits = self._pipeline.step(bucket, calls)
        counts = [sum(p.samples for p in pieces) for pieces in micro_batches]
        return [rows[:n] for rows, n in zip(logits, counts, strict=True)]

    def _check_pieces(self, micro_batches: Sequence[Sequence[Piece]]) -> None:
        if (most := max(map(len, micro_batches))) > self.rows:
            raise ModelError(
                f"pipelining: {most} requests in a micro-batch of {self.rows} rows"
            )
        requests = [p.request for pieces in micro_batches for p in pieces]
        if len(set(requests)) < len(requests):
            raise ModelError(
                "pipelining: a request is in two micro-batches of a step; its next "
                "token is known only when the step is through"
            )

    def _call(self, pieces: Sequence[Piece], tokens: int) -> _RaggedCall:
        return _RaggedCall.of(pieces, tokens, self.rows, self.caches, self._device)


@dataclass(frozen=True)
class _RaggedCall:
    """A micro-batch as tensors: ids and positions [1, N], rows that sample [K]."""

    pieces: Sequence[Piece]
    tensors: tuple[Tensor, Tensor, Tensor]
    caches: dict[int, RaggedCache]

    @classmethod
    def of(
        cls,
        pieces: Sequence[Piece],
        tokens: int,
        rows: int,
        caches: dict[int, RaggedCache],
        device: torch.device,
    ) -> _RaggedCall:
        """Lay the pieces one behind the other, padded to ``tokens`` and ``rows``."""
        ids, positions, last = laid_flat(pieces)
        padded = (
            torch.tensor(values + [0] * (size - len(values)), device=device)
            for values, size in ((ids, tokens), (positions, tokens), (last, rows))
        )
        flat_ids, flat_positions, wanted = padded
        return cls(pieces, (flat_ids[None], flat_positions[None], wanted), caches)

    def arguments(self, stage: int) -> tuple[Any, ...]:
        """Return the call of a stage, whose cache then knows the rows."""
        cache = self.caches[stage]
        cache.place(self.pieces)
        return (*self.tensors, cache)


def _keep(cache: RaggedCache, layers: range) -> None:
    """Give up the pages of the layers that other stages run."""
    pools = [*enumerate(cache.keys), *enumerate(cache.values)]
    give_up([pool for layer, pool in pools if layer not in layers])
