"""Runs the chunks of a loop in order or out of order, whichever was found faster."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from graphopt.ir.loop_call import LoopCall
from graphopt.ir.loops import ChunkOrder
from graphopt.remarks import Remark, analysis, missed
from graphopt.runtime.schedule.decision import Decision, decide
from graphopt.runtime.schedule.durations import Durations
from graphopt.runtime.schedule.machine import Machine
from graphopt.runtime.schedule.policies import IN_ORDER
from graphopt.runtime.schedule.program import ChunkRun, TaskProgram, chunk_runs
from graphopt.runtime.schedule.streams import Streams
from graphopt.runtime.schedule.workers import Workers

Tell = Callable[[Remark], None]
_SITE = "chunks"


@dataclass
class _Known:
    """What was measured for batches of one size."""

    warm: bool = False
    whole: Durations = field(default_factory=Durations)
    share: Durations = field(default_factory=Durations)
    decisions: dict[tuple[int, bool], Decision] = field(default_factory=dict)


class LoopScheduler:
    """What a `ChunkLoop` calls instead of running one chunk after the other.

    The first prompts run in order: one to warm up, one measured with all of the
    machine, one with a single processor's share. From then on a plan is simulated for
    each number of chunks; where it is predicted to be faster it is tried twice, with a
    measured run in order in between, and kept if it is. All prompts run the same
    compiled groups on the same tensors. With autograd on, and prompts of one chunk, run
    in order.

    ``tell`` is given a remark for each decision.
    """

    def __init__(
        self, program: TaskProgram, order: ChunkOrder, device: torch.device, tell: Tell
    ) -> None:
        self.program, self._order = program, order
        self._device, self._tell = device, tell
        self._machine: Machine | None = None
        self._threads = 0
        self._told: set[str] = set()
        self._known: dict[int, _Known] = {}

    def __call__(self, call: LoopCall) -> None:
        """Run all chunks of ``call``."""
        runs, groups = chunk_runs(self.program, call), len(self.program.groups)
        machine = self._made_for_now()
        if self._must_be_in_order(call, machine):
            machine.in_order(runs, groups)
            return
        known = self._known.setdefault(call.batch, _Known())
        if not known.warm:
            machine.in_order(runs, groups)
            known.warm = True
        elif not known.whole.covers(call.pasts):
            known.whole.note(call.pasts, machine.timed(runs, groups))
        elif not known.share.covers(call.pasts):
            known.share.note(call.pasts, machine.timed_alone(runs, groups))
        else:
            self._run(machine, runs, call, known)

    def _made_for_now(self) -> Machine:
        """Return the machine; a new one when torch's number of threads has changed."""
        threads = torch.get_num_threads()
        if self._machine is None or threads != self._threads:
            self._threads, self._known = threads, {}
            self._machine = self._new_machine()
        return self._machine

    def _new_machine(self) -> Machine:
        count = self._order.processors
        if self._device.type == "cuda":
            return Streams(count, self._device)
        return Workers(count)

    def _must_be_in_order(self, call: LoopCall, machine: Machine) -> bool:
        """Tell, and say once why, where nothing was asked for that forbids it."""
        asked = self._order.policy != IN_ORDER and self._order.processors > 1
        if len(call.pasts) < 2 or not asked:
            return True
        if len(machine.processors) < 2:
            return self._refuse("one-thread", "torch has one thread; give it more")
        if torch.is_grad_enabled():
            return self._refuse("autograd", "autograd is on; use torch.no_grad()")
        return False

    def _refuse(self, code: str, reason: str) -> bool:
        if code not in self._told:
            self._told.add(code)
            self._tell(missed(_SITE, code, f"chunks run in order: {reason}"))
        return True

    def _decision(self, call: LoopCall, known: _Known, machine: Machine) -> Decision:
        key = (len(call.pasts), call.overlaps)
        if key not in known.decisions:
            measured = (known.whole, known.share)
            found = decide(
                self.program, call.pasts, key[1], measured, machine, self._order
            )
            known.decisions[key] = found
            if found.settled:
                self._report(call, found)
        return known.decisions[key]

    def _run(
        self, machine: Machine, runs: list[ChunkRun], call: LoopCall, known: _Known
    ) -> None:
        found, groups = self._decision(call, known, machine), len(self.program.groups)
        if found.settled:
            if found.runs_plan:
                machine.out_of_order(runs, found.dag, found.plan.timeline)
            else:
                machine.in_order(runs, groups)
            return
        if found.wants_check:
            known.whole.note(call.pasts, machine.timed(runs, groups))
            found.check(known.whole.total(call.pasts))
        else:
            seconds = machine.seconds(runs, found.dag, found.plan.timeline)
            found.measured.append(seconds)
        if found.settled:
            self._report(call, found)

    def _report(self, call: LoopCall, found: Decision) -> None:
        shape = f"{len(call.pasts)} chunks of {call.batch} rows"
        text = f"{shape}: {found.text()}"
        figures = {"chunks": len(call.pasts), "batch": call.batch, **found.figures()}
        self._tell(analysis(_SITE, "order", text, **figures))
