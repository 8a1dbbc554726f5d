"""Policies in the simulator: what is true of all of them, and the rule of each."""

from __future__ import annotations

import pytest
from hypothesis import given, settings

from graphopt.errors import GraphoptError
from graphopt.runtime.schedule.dag import Dag, Group, Task, chunk_dag, repeated
from graphopt.runtime.schedule.policies import (
    IN_ORDER,
    POLICIES,
    Processor,
    policy_named,
    stagger,
)
from graphopt.runtime.schedule.simulator import plan, simulate
from tests.runtime.schedule.graphs import (
    CPU,
    NPU,
    PAPER,
    PLAIN,
    POOL,
    assert_valid,
    graphs,
)


@settings(max_examples=150, deadline=None)
@given(graphs())
def test_every_policy_keeps_the_dependencies_and_never_overlaps(graph):
    dag, processors = graph
    for policy in POLICIES.values():
        assert_valid(simulate(dag, processors, policy))


@settings(max_examples=150, deadline=None)
@given(graphs())
def test_a_plan_is_never_slower_than_in_order(graph):
    dag, processors = graph
    base = simulate(dag, processors, POLICIES[IN_ORDER])
    longest = max(task.duration for task in dag.tasks)
    for name, policy in POLICIES.items():
        found = plan(dag, processors, name)
        assert longest <= found.makespan <= base.makespan
        own = simulate(dag, processors, policy).makespan
        assert found.makespan == min(own, base.makespan)
        assert found.policy == (name if own < base.makespan else IN_ORDER)
        assert found.asked == name


@settings(max_examples=50, deadline=None)
@given(graphs())
def test_time_on_each_processor_adds_up(graph):
    dag, processors = graph
    timeline = simulate(dag, processors, POLICIES["greedy"])
    busy = [timeline.busy(p.name) for p in processors]
    assert sum(busy) == pytest.approx(sum(task.duration for task in dag.tasks))
    for processor, seconds in zip(processors, busy, strict=True):
        rate = timeline.bubble_rate(processor.name)
        assert rate * timeline.makespan == pytest.approx(timeline.makespan - seconds)


@pytest.mark.parametrize("chunks", [1, 2, 3, 5])
def test_in_order_runs_each_processor_chunk_by_chunk(chunks):
    dag = chunk_dag(repeated(PAPER, 2), chunks, lambda i, j: 1.0 + j)
    timeline = simulate(dag, (NPU, CPU), POLICIES[IN_ORDER])
    for processor in (NPU, CPU):
        own = [r.task for r in timeline.ran if r.processor == processor.name]
        assert own == sorted(own)


def test_in_order_leaves_a_second_worker_idle():
    """A chunk is a chain: only its last group overlaps the next one's first."""
    dag = chunk_dag(repeated(PLAIN, 2), 3, lambda i, j: 1.0)
    assert simulate(dag, POOL[:2], POLICIES[IN_ORDER]).makespan == 3 * 6 - 2
    # 18 groups on two workers; attention needs keys of earlier chunks alone.
    assert simulate(dag, POOL[:2], POLICIES["critical-path"]).makespan <= 10


def test_two_chunks_in_step():
    groups = repeated(PLAIN, 3)
    dag = chunk_dag(groups, 5, lambda i, j: 1.0)
    timeline = simulate(dag, POOL[:2], stagger)
    starts = {}
    for ran in timeline.ran:
        task = dag.tasks[ran.task]
        starts[task.chunk, task.position] = ran.start
    steps = len(groups) + 4
    for (chunk, position), start in starts.items():
        pair, second = divmod(chunk, 2)
        assert start == pair * steps + position + 4 * second
    # The odd last chunk, which mllm leaves out, runs alone.
    assert timeline.makespan == 2 * steps + len(groups)


def test_a_step_of_the_stagger_ends_for_both_chunks_at_once():
    dag = chunk_dag(repeated(PLAIN, 2), 2, lambda i, j: 5.0 if i == 0 else 1.0)
    ran = simulate(dag, POOL[:2], stagger).ran
    first = {r.start for r in ran if dag.tasks[r.task].chunk == 0}
    both = [r.start for r in ran if dag.tasks[r.task].chunk == 1][:2]
    assert set(both) <= first


def choices() -> Dag:
    """Two ready tasks: what the second unlocks takes longer."""
    groups = [Group(0, name, processor="x") for name in "abcd"]
    seconds = (1.0, 1.0, 2.0, 7.0)
    tasks = [
        Task(i, 0, g, s) for i, (g, s) in enumerate(zip(groups, seconds, strict=True))
    ]
    return Dag(tuple(tasks), ((), (), (0,), (1,)))


@pytest.mark.parametrize(("int8", "first"), [(False, 1), (True, 0)])
def test_the_rule_of_the_paper(int8, first):
    """+ sum of what is unlocked on a CPU, - that sum on the int8 processor."""
    processor = Processor("x", int8)
    ran = simulate(choices(), (processor,), POLICIES["greedy"]).ran
    assert ran[0].task == first


def test_the_critical_path_goes_first():
    ran = simulate(choices(), (Processor("x"),), POLICIES["critical-path"]).ran
    assert [r.task for r in ran] == [1, 3, 0, 2]


def test_mistakes():
    dag = chunk_dag(repeated(PAPER, 1), 2, lambda i, j: 1.0)
    with pytest.raises(GraphoptError, match="tasks ask for \\['npu'\\]"):
        simulate(dag, (CPU,), POLICIES["greedy"])
    with pytest.raises(GraphoptError, match="names of their own"):
        simulate(dag, (CPU, CPU), POLICIES["greedy"])
    with pytest.raises(GraphoptError, match="every processor idle with 8 of 8"):
        simulate(dag, (CPU, NPU), lambda dag, processors: lambda *_: None)
    with pytest.raises(GraphoptError, match="did you mean 'greedy'"):
        policy_named("gredy")
