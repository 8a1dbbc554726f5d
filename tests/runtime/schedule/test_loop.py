"""When chunks run out of order: measured first, kept only where it is faster."""

from __future__ import annotations

import pytest
import torch

from graphopt.ir.loops import ChunkOrder
from graphopt.runtime.schedule import loop as module
from graphopt.runtime.schedule.dag import repeated
from graphopt.runtime.schedule.durations import Durations
from graphopt.runtime.schedule.loop import LoopScheduler
from graphopt.runtime.schedule.policies import Processor
from tests.runtime.schedule.fakes import Call, Log
from tests.runtime.schedule.graphs import PLAIN


class Machine:
    """Two processors; one does a task in ``share`` times what both together take."""

    processors = (Processor("a"), Processor("b"))

    def __init__(self, share, measured):
        self.share, self.measured, self.asked = share, measured, []

    def _all(self, name, runs, groups):
        self.asked.append(name)
        for run in runs:
            for _ in range(groups):
                run.step()
            run.keep()

    def in_order(self, runs, groups):
        self._all("in order", runs, groups)

    def timed(self, runs, groups):
        self._all("timed", runs, groups)
        return [[1.0] * groups for _ in runs]

    def timed_alone(self, runs, groups):
        self._all("timed alone", runs, groups)
        return [[self.share] * groups for _ in runs]

    def out_of_order(self, runs, dag, timeline):
        self._all("out of order", runs, len(dag.tasks) // len(runs))

    def seconds(self, runs, dag, timeline):
        self._all("tried", runs, len(dag.tasks) // len(runs))
        return self.measured


@pytest.fixture
def made(monkeypatch):
    def make(share, measured, policy="greedy", processors=2):
        machine, remarks = Machine(share, measured), []
        monkeypatch.setattr(module, "Workers", lambda most: machine)
        log = Log(repeated(PLAIN, 3))
        order, device = ChunkOrder(policy, processors), torch.device("cpu")
        return (
            LoopScheduler(log.program, order, device, remarks.append),
            machine,
            remarks,
        )

    return make


def called(scheduler, machine, calls):
    with torch.no_grad():
        for call in calls:
            scheduler(call)
            assert len(call.kept) == len(call.pasts)
    return machine.asked


FIRST = ["in order", "timed", "timed alone"]
TRIED = ["tried", "timed", "tried"]


def test_a_plan_that_is_faster_is_kept(made):
    scheduler, machine, remarks = made(1.2, 30.0)
    asked = called(scheduler, machine, [Call(4) for _ in range(8)])
    assert asked == [*FIRST, *TRIED, "out of order", "out of order"]
    (remark,) = remarks
    assert (remark.kind, remark.code, remark.site) == ("analysis", "order", "chunks")
    assert "greedy is kept" in remark.message
    assert remark.figures["in_order_seconds"] == 4 * 9
    assert remark.figures["predicted_seconds"] < 36 > remark.figures["measured_seconds"]
    assert remark.figures["policy"] == "greedy"


def test_a_plan_that_turns_out_slower_is_given_up(made):
    scheduler, machine, remarks = made(1.2, 40.0)
    asked = called(scheduler, machine, [Call(4) for _ in range(7)])
    assert asked == [*FIRST, *TRIED, "in order"]
    assert "greedy takes 40 s, in-order 36 s: in-order is kept" in remarks[0].message
    assert remarks[0].figures["policy"] == "in-order"


def test_in_order_is_measured_again_between_the_trials(made):
    """Other work may have slowed the first run."""
    scheduler, machine, remarks = made(1.2, 30.0)
    called(scheduler, machine, [Call(4) for _ in range(4)])
    machine.timed = lambda runs, groups: (
        Machine.timed(machine, runs, groups) and [[0.5] * groups for _ in runs]
    )
    asked = called(scheduler, machine, [Call(4) for _ in range(2)])
    assert asked == [*FIRST, "tried", "timed", "in order"]
    assert "greedy takes 30 s, in-order 18 s: in-order is kept" in remarks[0].message


def test_a_plan_that_is_predicted_slower_is_not_tried(made):
    scheduler, machine, remarks = made(2.5, 1.0)
    asked = called(scheduler, machine, [Call(4) for _ in range(5)])
    assert asked == [*FIRST, "in order", "in order"]
    assert "is predicted to take" in remarks[0].message
    assert remarks[0].figures["measured_seconds"] is None


def test_shorter_prompts_use_what_longer_ones_have_measured(made):
    scheduler, machine, remarks = made(1.2, 1.0)
    calls = [Call(5)] * 3 + [Call(3, overlaps=True)] * 4 + [Call(6)] * 3 + [Call(4)]
    asked = called(
        scheduler, machine, [Call(len(c.pasts), overlaps=c.overlaps) for c in calls]
    )
    middle = [*TRIED, "out of order"]
    longer = ["timed", "timed alone", "tried"]
    assert asked == [*FIRST, *middle, *longer, "tried"]
    assert len(remarks) == 1  # the others are still being tried


def test_no_choice(made):
    scheduler, machine, remarks = made(1.2, 1.0)
    assert called(scheduler, machine, [Call(1)] * 5) == ["in order"] * 5
    assert not remarks
    machine.asked.clear()
    for _ in range(3):
        scheduler(Call(4))
    assert machine.asked == ["in order"] * 3
    assert [r.code for r in remarks] == ["autograd"]
    scheduler, machine, _ = made(1.2, 1.0, policy="in-order")
    assert called(scheduler, machine, [Call(4) for _ in range(5)]) == ["in order"] * 5


def test_batches_are_measured_apart(made):
    scheduler, machine, _ = made(1.2, 1.0)
    calls = [Call(4), Call(4), Call(4, batch=3), Call(4)]
    asked = called(scheduler, machine, calls)
    assert asked == ["in order", "timed", "in order", "timed alone"]


def test_durations_between_two_pasts():
    found = Durations()
    assert not found.covers([0])
    found.note([0, 256, 512], [[1.0, 2.0], [1.0, 4.0], [2.0, 6.0]])
    found.note([0, 256], [[3.0, 1.0], [0.5, 9.0]])  # the best counts
    assert found.of(0, 1) == 1.0
    assert found.of(256, 0) == 0.5
    assert found.of(384, 1) == 5.0
    assert found.covers([0, 400])
    assert not found.covers([0, 513])
    assert found.total([0, 512]) == 1.0 + 1.0 + 2.0 + 6.0


def test_one_thread_is_told(monkeypatch):
    before, remarks = torch.get_num_threads(), []
    torch.set_num_threads(1)
    try:
        log = Log(PLAIN)
        order = ChunkOrder("greedy", 2)
        scheduler = LoopScheduler(
            log.program, order, torch.device("cpu"), remarks.append
        )
        with torch.no_grad():
            for _ in range(5):
                scheduler(Call(3))
    finally:
        torch.set_num_threads(before)
    assert [r.code for r in remarks] == ["one-thread"]
    assert log.steps == 5 * [(i, j) for i in range(3) for j in range(3)]
