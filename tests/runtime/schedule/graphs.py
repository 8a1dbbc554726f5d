"""Random graphs of tasks, and what must be true of every way to run them."""

from __future__ import annotations

from itertools import pairwise

from hypothesis import strategies as st

from graphopt.runtime.schedule.dag import Dag, Group, chunk_dag, repeated
from graphopt.runtime.schedule.policies import Processor
from graphopt.runtime.schedule.simulator import Timeline

NPU, CPU = Processor("npu", int8=True), Processor("cpu")
POOL = (Processor("a"), Processor("b"), Processor("c"))
# Four subgraphs a layer, as the paper's example has.
PAPER = (
    Group(0, "norm", processor="cpu"),
    Group(0, "qkv", processor="npu"),
    Group(0, "attention", dynamic=True, processor="cpu"),
    Group(0, "ffn", processor="npu"),
)
PLAIN = (Group(0, "qkv"), Group(0, "attention", dynamic=True), Group(0, "ffn"))


@st.composite
def graphs(draw) -> tuple[Dag, tuple[Processor, ...]]:
    """Return a graph with random durations (some are zero) and processors for it."""
    part, processors = draw(
        st.sampled_from([(PAPER, (NPU, CPU)), (PLAIN, POOL[:2]), (PLAIN, POOL)])
    )
    groups = repeated(part, draw(st.integers(1, 4)))
    chunks = draw(st.integers(1, 6))
    size = len(groups) * chunks
    seconds = st.integers(0, 9).map(float)
    durations = draw(st.lists(seconds, min_size=size, max_size=size))
    overlap = draw(st.booleans())
    found = chunk_dag(
        groups, chunks, lambda i, j: durations[i * len(groups) + j], overlap
    )
    return found, processors


def assert_valid(timeline: Timeline) -> None:
    """Every task runs once, where it may, after what it needs; nothing overlaps."""
    dag = timeline.dag
    ran = {run.task: run for run in timeline.ran}
    assert sorted(run.task for run in timeline.ran) == list(range(len(dag.tasks)))
    for run in timeline.ran:
        task = dag.tasks[run.task]
        assert task.runs_on(run.processor)
        assert run.end == run.start + task.duration
        assert all(ran[n].end <= run.start for n in dag.needs[run.task])
    for processor in timeline.processors:
        own = [run for run in timeline.ran if run.processor == processor.name]
        assert all(a.end <= b.start for a, b in pairwise(own))
