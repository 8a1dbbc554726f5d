"""Stages of torch.distributed.pipelining over one model, and the steps they run."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import (
    PipelineStage,
    ScheduleGPipe,
    ScheduleInterleaved1F1B,
)

from graphopt.errors import ModelError
from graphopt.integrations.pipelining.program import Probe
from graphopt.integrations.pipelining.sizes import TensorLike
from graphopt.integrations.pipelining.staged import StagedModel


class Call(Protocol):
    """One micro-batch: what the model is called with, the same on every rank."""

    def arguments(self, stage: int) -> tuple[Any, ...]:
        """Return the arguments of a stage's call, its part of the cache ready."""
        ...


class StageModule(nn.Module):
    """One stage as a schedule calls it: ``forward(*received, call=...)``.

    ``call`` [1, 1] is the number of the micro-batch. What a micro-batch is made of lies
    on every rank; hidden states alone are sent.
    """

    def __init__(self, model: StagedModel, stage: int) -> None:
        super().__init__()
        self._model, self._stage = model, stage
        self.calls: Sequence[Call] = ()

    @torch.no_grad()
    def forward(self, *received: Tensor, call: Tensor) -> Any:
        """Run the stage; return what it sends, and the last one the logits."""
        given = received if self._stage else ()
        arguments = self.calls[int(call)].arguments(self._stage)
        sent, logits = self._model(self._stage, given, *arguments)
        return logits if self._stage == self._model.stages - 1 else sent


class Pipeline:
    """The stages of this rank, one set of stage objects for each known bucket.

    ``group`` holds the ranks of the pipeline, each of which runs ``per_rank`` stages:
    with one they run by `ScheduleGPipe`, with more by `ScheduleInterleaved1F1B`, which
    fills the pipeline in less time. A stage object sends tensors of fixed sizes, so
    each bucket (number of tokens) that calls come in has its own, made by `open` on all
    ranks together, over the same module and cache.
    """

    def __init__(
        self, model: StagedModel, group: dist.ProcessGroup | None, per_rank: int = 1
    ) -> None:
        self.model, self.group, self._per_rank = model, group, per_rank
        self._rank, self._ranks = dist.get_rank(group), dist.get_world_size(group)
        self._modules = {stage: StageModule(model, stage) for stage in model.own}
        self._probes: dict[Hashable, Probe] = {}
        self._schedules: dict[tuple[Hashable, int], Any] = {}

    def open(self, bucket: Hashable, call: Call) -> None:
        """Compile for calls like ``call``, which are of ``bucket``."""
        self._probes[bucket] = self._probe(call)

    def measure(self, call: Call) -> Hashable:
        """Open and return the bucket of calls that exchange what ``call`` does."""
        probe = self._probe(call)
        self._probes.setdefault(probe, probe)
        return probe

    def _probe(self, call: Call) -> Probe:
        probes = [self.model.probe(*call.arguments(s)) for s in self.model.own]
        return probes[0]

    @property
    def buckets(self) -> list[Hashable]:
        """Return the buckets that are known."""
        return list(self._probes)

    def step(self, bucket: Hashable, calls: Sequence[Call]) -> Tensor:
        """Run micro-batches of one bucket; return the logits [M, K, V] on every rank.

        Raises ModelError, on every rank and before anything is sent, for a bucket that
        is not known: stages of other sizes would break each other's connections.
        """
        if bucket not in self._probes:
            raise ModelError(
                f"pipelining: no stage is made for micro-batches of {bucket} tokens; "
                f"known are {sorted(map(str, self._probes))}: pad to one of these, or "
                "open the bucket on every rank first"
            )
        for module in self._modules.values():
            module.calls = calls
        numbers = torch.arange(len(calls)).reshape(-1, 1)
        schedule = self._schedule(bucket, len(calls))
        first = (numbers,) if 0 in self.model.own else ()
        merged = schedule.eval(*first, call=numbers)
        return self._shared(bucket, len(calls), merged)

    def _schedule(self, bucket: Hashable, calls: int) -> Any:
        if (bucket, calls) not in self._schedules:
            stages: list[Any] = [self._stage(bucket, s) for s in self.model.own]
            if self._per_rank == 1:
                made: Any = ScheduleGPipe(stages[0], calls)
            else:
                made = ScheduleInterleaved1F1B(stages, calls)
            self._schedules[bucket, calls] = made
        return self._schedules[bucket, calls]

    def _stage(self, bucket: Hashable, stage: int) -> PipelineStage:
        probe, last = self._probes[bucket], self.model.stages - 1
        number = TensorLike((1, 1), torch.int64, self._device(bucket))
        inputs = probe.received[stage] if stage else [number]
        outputs = (probe.result,) if stage == last else probe.received[stage + 1]
        return PipelineStage(
            self._modules[stage],
            stage,
            self.model.stages,
            self._device(bucket),
            input_args=tuple(like.empty() for like in inputs),
            output_args=tuple(like.empty() for like in outputs),
            group=self.group,
        )

    def _device(self, bucket: Hashable) -> torch.device:
        return self._probes[bucket].result.device

    def _shared(self, bucket: Hashable, calls: int, merged: Tensor | None) -> Tensor:
        """Give every rank what the last stage computed."""
        like = self._probes[bucket].result
        shape = (calls * like.shape[0], *like.shape[1:])
        if merged is None:
            merged = TensorLike(shape, like.dtype, like.device).empty()
        merged = merged.contiguous()
        if self._ranks > 1:
            dist.broadcast(merged, group=self.group, group_src=self._ranks - 1)
        return merged
