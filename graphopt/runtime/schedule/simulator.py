"""A discrete-event simulation of tasks on processors: who runs what, and when."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from graphopt.errors import GraphoptError
from graphopt.runtime.events import EventQueue
from graphopt.runtime.schedule.dag import Dag
from graphopt.runtime.schedule.policies import (
    IN_ORDER,
    Pick,
    Policy,
    Processor,
    State,
    policy_named,
)


@dataclass(frozen=True)
class Ran:
    """Task number ``task`` on a processor; times in seconds."""

    task: int
    processor: str
    start: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """What ran when: each task of ``dag`` once, by start."""

    dag: Dag
    processors: tuple[Processor, ...]
    ran: tuple[Ran, ...]

    @property
    def makespan(self) -> float:
        """Return the seconds from the first start to the last end."""
        return max((ran.end for ran in self.ran), default=0.0)

    def busy(self, processor: str) -> float:
        """Return the seconds that ``processor`` runs tasks."""
        return sum(r.end - r.start for r in self.ran if r.processor == processor)

    def bubble_rate(self, processor: str) -> float:
        """Return the share of the makespan that ``processor`` is idle."""
        whole = self.makespan
        return 1.0 - self.busy(processor) / whole if whole else 0.0


def simulate(dag: Dag, processors: Sequence[Processor], policy: Policy) -> Timeline:
    """Run ``dag`` by ``policy``.

    Raises GraphoptError for a task of a processor that is not there, and for a policy
    that leaves all of them idle with tasks to run.
    """
    _check(dag, processors)
    run = _Run(dag, processors, policy(dag, processors))
    ran = run.finish()
    if len(ran) < len(dag.tasks):
        raise GraphoptError(
            f"the policy left every processor idle with {len(dag.tasks) - len(ran)} "
            f"of {len(dag.tasks)} tasks to run; it has to pick one when nothing runs"
        )
    return Timeline(dag, tuple(processors), tuple(ran))


def _check(dag: Dag, processors: Sequence[Processor]) -> None:
    names = [p.name for p in processors]
    if not names or len(set(names)) < len(names):
        raise GraphoptError(f"processors need names of their own, not {names}")
    asked = {task.processor for task in dag.tasks} - {None, *names}
    if asked:
        raise GraphoptError(
            f"tasks ask for {sorted(map(str, asked))}; there is {names}"
        )


class _Run:
    def __init__(self, dag: Dag, processors: Sequence[Processor], pick: Pick) -> None:
        self._dag, self._pick = dag, pick
        self._state = State(dag)
        self._processors = processors
        self._idle = list(processors)
        self._ready = [i for i, needed in enumerate(dag.needs) if not needed]
        self._ends: EventQueue[tuple[Processor, int]] = EventQueue()
        self._ran: list[Ran] = []

    def finish(self) -> list[Ran]:
        self._start(0.0)
        while self._ends:
            time = self._ends.next_time
            while self._ends.next_time == time:
                _, (processor, task) = self._ends.pop()
                self._idle.append(processor)
                self._ready += self._state.end(task)
            self._start(time)
        return self._ran

    def _start(self, time: float) -> None:
        """Start whatever the policy wants now; one start may allow another."""
        started = True
        while started:
            idle = [p for p in self._processors if p in self._idle]
            started = any(self._try(processor, time) for processor in idle)

    def _try(self, processor: Processor, time: float) -> bool:
        tasks = self._dag.tasks
        able = sorted(t for t in self._ready if tasks[t].runs_on(processor.name))
        task = self._pick(processor, able, self._state) if able else None
        if task is None:
            return False
        end = time + tasks[task].duration
        self._ready.remove(task)
        self._idle.remove(processor)
        self._state.started[task] = True
        self._ran.append(Ran(task, processor.name, time, end))
        self._ends.push(end, (processor, task))
        return True


@dataclass(frozen=True)
class Plan:
    """The order in which tasks are to run, and what it was compared with.

    ``policy`` is whose order it is: that of ``asked``, or in-order where that is no
    slower.
    """

    timeline: Timeline
    policy: str
    asked: str
    in_order: Timeline

    @property
    def makespan(self) -> float:
        """Return the seconds that it takes, never more than in order."""
        return self.timeline.makespan

    @property
    def order(self) -> list[int]:
        """Return the tasks by start; each comes after all that it needs."""
        return [ran.task for ran in self.timeline.ran]


def plan(dag: Dag, processors: Sequence[Processor], asked: str) -> Plan:
    """Return the plan of the policy named ``asked``, or in-order where it is no worse.

    No rule here is optimal (the problem is NP-hard), and each loses on some graph.
    """
    base = simulate(dag, processors, policy_named(IN_ORDER))
    found = simulate(dag, processors, policy_named(asked))
    if asked == IN_ORDER or found.makespan >= base.makespan:
        return Plan(base, IN_ORDER, asked, base)
    return Plan(found, asked, asked, base)
