"""Which task a free processor runs next.

A policy gets the whole graph of tasks before the first one runs, and returns a function
that picks for a free processor among the tasks that are ready and that it may run; None
leaves it idle until something else has ended.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from graphopt.errors import GraphoptError, did_you_mean
from graphopt.runtime.schedule.dag import Dag, Task


@dataclass(frozen=True)
class Processor:
    """What runs one task at a time; ``int8`` for an NPU, which runs the linears."""

    name: str
    int8: bool = False


@dataclass
class State:
    """How far a run is: ``missing`` counts the needs of each task that have not ended.

    ``started`` has each task that runs or has run, ``ended`` those that have;
    ``unlocks`` the seconds of the tasks that the end of each one alone makes ready.
    """

    dag: Dag
    missing: list[int] = field(init=False)
    started: list[bool] = field(init=False)
    ended: list[bool] = field(init=False)
    unlocks: list[float] = field(init=False)

    def __post_init__(self) -> None:
        size = len(self.dag.tasks)
        self.missing = [len(needed) for needed in self.dag.needs]
        self.started, self.ended = [False] * size, [False] * size
        self.unlocks = [0.0] * size
        for task, missing in enumerate(self.missing):
            if missing == 1:
                self._note_last(task)

    def end(self, task: int) -> list[int]:
        """Note that ``task`` has ended; return what is ready now and was not."""
        self.ended[task] = True
        for other in self.dag.unlocks[task]:
            self.missing[other] -= 1
            if self.missing[other] == 1:
                self._note_last(other)
        return [other for other in self.dag.unlocks[task] if not self.missing[other]]

    def _note_last(self, task: int) -> None:
        """Let the one task that ``task`` waits for know that it is the only one."""
        last = next(n for n in self.dag.needs[task] if not self.ended[n])
        self.unlocks[last] += self.dag.tasks[task].duration


Pick = Callable[[Processor, Sequence[int], State], int | None]
Policy = Callable[[Dag, Sequence[Processor]], Pick]


def in_order(dag: Dag, processors: Sequence[Processor]) -> Pick:
    """Run each processor's tasks in program order; it waits for the next in line."""
    queues = {p.name: _queue(dag, p.name) for p in processors}

    def pick(processor: Processor, ready: Sequence[int], state: State) -> int | None:
        queue = queues[processor.name]
        while queue and state.started[queue[-1]]:
            queue.pop()
        return queue[-1] if queue and queue[-1] in ready else None

    return pick


def _queue(dag: Dag, processor: str) -> list[int]:
    """Return what ``processor`` may run, the first in program order at the end."""
    order = reversed(range(len(dag.tasks)))
    return [task for task in order if dag.tasks[task].runs_on(processor)]


def stagger(dag: Dag, processors: Sequence[Processor], shift: int = 4) -> Pick:
    """Run two chunks in lock step, the second ``shift`` groups behind the first.

    As mllm's ``ChunkPipeline`` does, with its barrier after every step: one pair of
    chunks after the other. Every chunk runs here, also the last of an odd number.
    """
    waves = _waves(dag, shift)
    members: dict[int, list[int]] = {}
    for task, wave in enumerate(waves):
        members.setdefault(wave, []).append(task)
    steps = sorted(members, reverse=True)

    def pick(processor: Processor, ready: Sequence[int], state: State) -> int | None:
        while len(steps) > 1 and all(state.ended[t] for t in members[steps[-1]]):
            steps.pop()
        return next((task for task in ready if waves[task] == steps[-1]), None)

    return pick


def _waves(dag: Dag, shift: int) -> list[int]:
    """Return the step in which each task runs, after those of all that it needs."""
    waves: list[int] = []
    start, begun = 0, 0
    for task, needed in zip(dag.tasks, dag.needs, strict=True):
        pair, second = divmod(task.chunk, 2)
        if pair != begun:
            start, begun = max(waves) + 1, pair
        planned = start + task.position + second * shift
        waves.append(max([planned, *(waves[n] + 1 for n in needed)]))
    return waves


def greedy(dag: Dag, processors: Sequence[Processor]) -> Pick:
    """Run the ready task with the largest C, the first in program order of equals.

    llm.npu, section 3.4: with S the tasks that its end makes ready, C is the sum of
    their durations on a CPU or GPU, which so feeds the others, and minus that sum on
    the int8 processor, which is not to wait for what it itself sends away.
    """

    def pick(processor: Processor, ready: Sequence[int], state: State) -> int | None:
        sign = -1.0 if processor.int8 else 1.0
        unlocks = state.unlocks
        return max(ready, key=lambda task: (sign * unlocks[task], -task), default=None)

    return pick


def critical_path(dag: Dag, processors: Sequence[Processor]) -> Pick:
    """Run the ready task from which the longest chain of tasks to the end begins."""
    length = [0.0] * len(dag.tasks)
    for task in reversed(range(len(dag.tasks))):
        behind = max((length[other] for other in dag.unlocks[task]), default=0.0)
        length[task] = dag.tasks[task].duration + behind

    def pick(processor: Processor, ready: Sequence[int], state: State) -> int | None:
        return max(ready, key=lambda task: (length[task], -task), default=None)

    return pick


IN_ORDER = "in-order"
POLICIES: Mapping[str, Policy] = {
    "greedy": greedy,
    IN_ORDER: in_order,
    "stagger": stagger,
    "critical-path": critical_path,
}


def policy_named(name: str) -> Policy:
    """Return a policy; GraphoptError names the nearest right name."""
    if name not in POLICIES:
        raise GraphoptError(f"no policy '{name}'{did_you_mean(name, POLICIES)}")
    return POLICIES[name]


__all__ = ["IN_ORDER", "POLICIES", "Policy", "Processor", "State", "Task"]
