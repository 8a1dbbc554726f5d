"""Whether the chunks of a prompt run out of order: predicted, then measured."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from graphopt.ir.loops import ChunkOrder
from graphopt.runtime.schedule.dag import Dag, chunk_dag
from graphopt.runtime.schedule.durations import Durations
from graphopt.runtime.schedule.machine import Machine
from graphopt.runtime.schedule.policies import IN_ORDER
from graphopt.runtime.schedule.program import TaskProgram
from graphopt.runtime.schedule.simulator import Plan, plan

TRIALS = 2  # runs of a plan that are measured before it is kept


@dataclass
class Decision:
    """The plan for prompts of so many chunks, and what was found of it, in seconds.

    ``in_order`` is what one chunk after the other takes with all of the machine, the
    best of two runs: one before the plan was made, one between its trials, for other
    work may have slowed the first. With ``force`` the plan runs even if it is slower.
    """

    dag: Dag
    plan: Plan
    in_order: float
    force: bool = False
    measured: list[float] = field(default_factory=list)
    checked: bool = False

    def check(self, seconds: float) -> None:
        """Take over what in-order takes by now."""
        self.in_order, self.checked = min(self.in_order, seconds), True

    @property
    def wants_check(self) -> bool:
        """Tell whether the next prompt is to run in order and to be measured."""
        return self.promising and bool(self.measured) and not self.checked

    @property
    def promising(self) -> bool:
        """Tell whether the plan is predicted to be the faster."""
        faster = self.plan.makespan < self.in_order
        return self.plan.policy != IN_ORDER and (faster or self.force)

    @property
    def settled(self) -> bool:
        """Tell whether there is nothing left to try."""
        return not self.promising or len(self.measured) >= TRIALS

    @property
    def runs_plan(self) -> bool:
        """Tell whether the next prompt runs by the plan."""
        faster = not self.settled or min(self.measured, default=0.0) < self.in_order
        return self.promising and (faster or self.force)

    def figures(self) -> dict[str, Any]:
        """Return what a remark says, in seconds; measured is the best of the trials."""
        timeline = self.plan.timeline
        bubbles = [round(timeline.bubble_rate(p.name), 4) for p in timeline.processors]
        return {
            "policy": self.plan.asked if self.runs_plan else IN_ORDER,
            "asked": self.plan.asked,
            "tasks": len(self.dag.tasks),
            "predicted_seconds": self.plan.makespan,
            "in_order_seconds": self.in_order,
            "measured_seconds": min(self.measured, default=None),
            "bubble_rates": bubbles,
        }

    def text(self) -> str:
        """Return one sentence for a remark."""
        asked, best = self.plan.asked, min(self.measured, default=None)
        found = f"{asked} takes {best:.4g} s" if best is not None else ""
        found = found or f"{asked} is predicted to take {self.plan.makespan:.4g} s"
        kept = self.plan.asked if self.runs_plan else IN_ORDER
        return f"{found}, in-order {self.in_order:.4g} s: {kept} is kept"


def decide(
    program: TaskProgram,
    pasts: Sequence[int],
    overlap: bool,
    known: tuple[Durations, Durations],
    machine: Machine,
    order: ChunkOrder,
) -> Decision:
    """Simulate ``order`` with what was measured: with all of the machine, with a
    processor's share of it."""
    whole, share = known
    dag = chunk_dag(
        program.groups, len(pasts), lambda i, j: share.of(pasts[i], j), overlap
    )
    found = plan(dag, machine.processors, order.policy)
    return Decision(dag, found, whole.total(pasts), order.force)
