"""CUDA streams, with a model of what waits for what in the place of a device."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from graphopt.runtime.schedule.dag import chunk_dag, repeated
from graphopt.runtime.schedule.policies import POLICIES
from graphopt.runtime.schedule.program import TaskProgram, chunk_runs
from graphopt.runtime.schedule.simulator import simulate
from graphopt.runtime.schedule.streams import Streams
from tests.runtime.schedule.fakes import Call
from tests.runtime.schedule.graphs import PLAIN


class Stream:
    """``seen``: everything that has surely ended when what is issued next begins."""

    def __init__(self, device=None):
        self.seen: set = set()

    def record_event(self):
        return frozenset(self.seen)

    def wait_event(self, event):
        self.seen |= event

    def wait_stream(self, other):
        self.seen |= other.seen


class Event:
    """Events that take time: each is a second after the last."""

    clock = 0.0

    def __init__(self, enable_timing):
        assert enable_timing

    def record(self, stream):
        Event.clock += 1.0
        self.time = Event.clock

    def elapsed_time(self, other):
        return 1e3 * (other.time - self.time)


class Value(torch.Tensor):
    """A tensor of a stream, which remembers who else reads it."""

    @staticmethod
    def of(stream):
        made = torch.empty(1).as_subclass(Value)
        made.stream, made.readers = stream, {stream}
        return made

    is_cuda = True

    def record_stream(self, stream):
        self.readers.add(stream)


@pytest.fixture
def cuda(monkeypatch):
    current = [Stream()]

    @contextmanager
    def use(stream):
        current.append(stream)
        yield
        current.pop()

    monkeypatch.setattr(torch.cuda, "Stream", Stream)
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "stream", use)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device=None: current[-1])
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: None)
    return current


class Kernels:
    """Each group of each chunk, issued on the current stream."""

    def __init__(self, current, groups):
        self.current, self.groups, self.dag = current, tuple(groups), None
        self.issued: list[int] = []

    @property
    def program(self):
        return TaskProgram(self.groups, self.start)

    def start(self, chunk):
        value = Value.of(self.current[-1])
        for position in range(len(self.groups)):
            stream, task = self.current[-1], chunk * len(self.groups) + position
            assert stream in value.readers
            if self.dag is not None:
                assert stream.seen.issuperset(self.dag.needs[task])
            assert "inputs" in stream.seen
            stream.seen.add(task)
            self.issued.append(task)
            value = Value.of(stream)
            yield (value,)


class Kept(Call):
    def __init__(self, current, *rest, **options):
        super().__init__(*rest, **options)
        self.current = current

    def keep(self, index, outputs):
        stream, (value,) = self.current[-1], outputs
        assert stream in value.readers
        self.kept[index] = value


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("chunks", [2, 3, 5])
def test_a_task_is_issued_behind_what_it_needs(cuda, policy, chunks):
    machine = Streams(2, torch.device("cuda"))
    kernels, call = Kernels(cuda, repeated(PLAIN, 3)), Kept(cuda, chunks)
    dag = chunk_dag(kernels.groups, chunks, lambda i, j: 1.0 + j % 2, overlap=True)
    timeline = simulate(dag, machine.processors, POLICIES[policy])
    cuda[0].seen.add("inputs")
    kernels.dag = dag
    machine.out_of_order(chunk_runs(kernels.program, call), dag, timeline)
    assert kernels.issued == [ran.task for ran in timeline.ran]
    assert sorted(call.kept) == list(range(chunks))
    assert cuda[0].seen.issuperset(range(len(dag.tasks)))  # the caller waits for all


def test_seconds_are_those_between_events(cuda):
    machine = Streams(2, torch.device("cuda"))
    kernels, call = Kernels(cuda, PLAIN), Kept(cuda, 3)
    cuda[0].seen.add("inputs")
    found = machine.timed(chunk_runs(kernels.program, call), 3)
    assert found == [[1.0] * 3] * 3
    assert kernels.issued == list(range(9))
    dag = chunk_dag(PLAIN, 3, lambda i, j: 1.0)
    timeline = simulate(dag, machine.processors, POLICIES["greedy"])
    again = chunk_runs(kernels.program, Kept(cuda, 3))
    assert machine.seconds(again, dag, timeline) == 1.0
