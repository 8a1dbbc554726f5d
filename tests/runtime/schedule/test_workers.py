"""Worker threads: plans are run with what each task needs, and errors come out."""

from __future__ import annotations

import threading

import pytest
import torch
from hypothesis import given, settings

from graphopt.runtime.schedule.board import Board
from graphopt.runtime.schedule.dag import chunk_dag, repeated
from graphopt.runtime.schedule.policies import POLICIES
from graphopt.runtime.schedule.program import chunk_runs
from graphopt.runtime.schedule.simulator import simulate
from graphopt.runtime.schedule.workers import Workers
from tests.runtime.schedule.fakes import Call, Log
from tests.runtime.schedule.graphs import PLAIN, graphs


@pytest.fixture(autouse=True)
def _four_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def planned(log, chunks, workers, policy="greedy", overlap=True):
    seconds = 1.0
    dag = chunk_dag(log.groups, chunks, lambda i, j: seconds + j % 3, overlap)
    return dag, simulate(dag, workers.processors, POLICIES[policy])


def run(log, call, workers, dag, timeline):
    workers.out_of_order(chunk_runs(log.program, call), dag, timeline)


@pytest.mark.parametrize("chunks", [2, 3, 5])
@pytest.mark.parametrize("policy", POLICIES)
def test_every_task_runs_once_behind_what_it_needs(chunks, policy):
    log, call, workers = Log(repeated(PLAIN, 3), seconds=1e-3), Call(chunks), Workers(3)
    dag, timeline = planned(log, chunks, workers, policy)
    run(log, call, workers, dag, timeline)
    assert sorted(log.steps) == [(t.chunk, t.position) for t in dag.tasks]
    ended = {step: place for place, step in enumerate(log.steps)}
    for number, needed in enumerate(dag.needs):
        task = dag.tasks[number]
        for other in (dag.tasks[n] for n in needed):
            place = ended[other.chunk, other.position]
            assert place < log.began[task.chunk, task.position]
    assert call.kept == {i: (i, 8) for i in range(chunks)}


def test_workers_share_torchs_threads():
    assert [len(Workers(n).processors) for n in (1, 2, 4, 9)] == [1, 2, 4, 4]
    found = set()
    workers = Workers(2)
    barrier = threading.Barrier(2)

    def look():
        barrier.wait(5)
        found.add((threading.get_ident(), torch.get_num_threads()))

    workers._together([look, look])
    assert sorted(threads for _, threads in found) == [2, 2]
    assert torch.get_num_threads() == 4


@pytest.mark.parametrize(
    "mode", [torch.no_grad, torch.inference_mode, torch.enable_grad]
)
def test_workers_have_the_callers_modes(mode):
    found = []

    def look():
        found.append((torch.is_grad_enabled(), torch.is_inference_mode_enabled()))

    with mode():
        Workers(2)._together([look])
        assert found == [(torch.is_grad_enabled(), torch.is_inference_mode_enabled())]


def test_an_error_of_a_task_is_raised_when_no_task_runs_any_more():
    log, call, workers = Log(repeated(PLAIN, 2), bad=(1, 2)), Call(3), Workers(2)
    dag, timeline = planned(log, 3, workers)
    with pytest.raises(ValueError, match="a kernel failed"):
        run(log, call, workers, dag, timeline)
    assert (1, 3) not in log.steps
    again = Log(repeated(PLAIN, 2))
    run(again, Call(3), workers, *planned(again, 3, workers))  # they still work
    assert len(again.steps) == 18


def test_measured_seconds_are_by_chunk_and_group():
    log, workers = Log(PLAIN, seconds=1e-4), Workers(2)
    for timed in (workers.timed, workers.timed_alone):
        call = Call(3)
        found = timed(chunk_runs(log.program, call), 3)
        assert [len(row) for row in found] == [3, 3, 3]
        assert all(seconds > 0 for row in found for seconds in row)
        assert sorted(call.kept) == [0, 1, 2]


@settings(max_examples=50, deadline=None)
@given(graphs())
def test_a_board_hands_out_ready_tasks_in_the_plans_order(graph):
    dag, processors = graph
    order = [ran.task for ran in simulate(dag, processors, POLICIES["greedy"]).ran]
    board, ended = Board(dag, order), set()
    while len(ended) < len(dag.tasks):
        ready = [
            task
            for task in order
            if task not in ended and ended.issuperset(dag.needs[task])
        ]
        name = dag.tasks[ready[0]].processor or processors[0].name
        task = board.take(name)
        assert task == next(t for t in ready if dag.tasks[t].runs_on(name))
        board.end(task)
        ended.add(task)
    assert all(board.take(p.name) is None for p in processors)
