"""Streams of a CUDA device as processors."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch

from graphopt.runtime.schedule.dag import Dag
from graphopt.runtime.schedule.policies import Processor
from graphopt.runtime.schedule.program import ChunkRun
from graphopt.runtime.schedule.simulator import Timeline


class Streams:
    """``count`` streams of ``device``; a `Machine`.

    Tasks are issued in the plan's order, each on the stream that it has there and
    behind the events of what it needs. The caching allocator hands memory out again by
    the stream that asked for it: whatever a task reads is recorded on the stream that
    reads it, and results are made on the caller's.
    """

    def __init__(self, count: int, device: torch.device) -> None:
        self._device = device
        self._streams = {f"stream {i}": torch.cuda.Stream(device) for i in range(count)}

    @property
    def processors(self) -> tuple[Processor, ...]:
        """Return the streams."""
        return tuple(map(Processor, self._streams))

    def in_order(self, runs: Sequence[ChunkRun], groups: int) -> None:
        """Run on the caller's stream."""
        for run in runs:
            for _ in range(groups):
                run.step()
            run.keep()

    def timed(self, runs: Sequence[ChunkRun], groups: int) -> list[list[float]]:
        """Run on the caller's stream, and wait for it."""
        marks = [self._mark()]
        for run in runs:
            for position in range(groups):
                run.step()
                if position == groups - 1:
                    run.keep()
                marks.append(self._mark())
        torch.cuda.synchronize(self._device)
        flat = [a.elapsed_time(b) / 1e3 for a, b in pairwise(marks)]
        return [flat[i : i + groups] for i in range(0, len(flat), groups)]

    def timed_alone(self, runs: Sequence[ChunkRun], groups: int) -> list[list[float]]:
        """Do the same: a stream that is alone has all of the device."""
        return self.timed(runs, groups)

    def out_of_order(
        self, runs: Sequence[ChunkRun], dag: Dag, timeline: Timeline
    ) -> None:
        """Issue all tasks; the caller's stream waits for the last of each."""
        caller = torch.cuda.current_stream(self._device)
        for stream in self._streams.values():
            stream.wait_stream(caller)
        ended: dict[int, tuple[str, Any]] = {}
        groups = len(dag.tasks) // len(runs)
        for ran in timeline.ran:
            task, stream = dag.tasks[ran.task], self._streams[ran.processor]
            for needed in dag.needs[ran.task]:
                where, event = ended[needed]
                if where != ran.processor:
                    stream.wait_event(event)
            run = runs[task.chunk]
            with torch.cuda.stream(stream):
                _record(run.reads, stream)
                run.step()
                ended[ran.task] = (ran.processor, stream.record_event())
            if task.position == groups - 1:
                caller.wait_event(ended[ran.task][1])
                _record(run.reads, caller)
                run.keep()

    def seconds(self, runs: Sequence[ChunkRun], dag: Dag, timeline: Timeline) -> float:
        """Run, wait, and return the seconds between two events around it."""
        start = self._mark()
        self.out_of_order(runs, dag, timeline)
        end = self._mark()
        torch.cuda.synchronize(self._device)
        return float(start.elapsed_time(end) / 1e3)

    def _mark(self) -> Any:
        event = torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self._device))
        return event


def _record(tensors: Sequence[Any], stream: Any) -> None:
    for tensor in tensors:
        if isinstance(tensor, torch.Tensor) and tensor.is_cuda:
            tensor.record_stream(stream)
