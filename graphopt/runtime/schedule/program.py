"""What a compiled body of a chunk loop gives a scheduler: a chunk, group by group."""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import Any

from graphopt.ir.loop_call import LoopCall
from graphopt.runtime.schedule.dag import Group

# Each step runs one op group and gives what the next one reads, the last the outputs.
Steps = Generator[tuple[Any, ...], None, None]


@dataclass(frozen=True)
class TaskProgram:
    """The op ``groups`` of a chunk in order, and ``start(*arguments)`` of the body."""

    groups: tuple[Group, ...]
    start: Callable[..., Steps]


class ChunkRun:
    """One chunk of a call on its way through the groups."""

    def __init__(self, program: TaskProgram, call: LoopCall, index: int) -> None:
        self._program, self._call, self.index = program, call, index
        self._steps: Steps | None = None
        self.reads: tuple[Any, ...] = ()  # of the next group; at the end the outputs

    def step(self) -> None:
        """Run the next group; steps of one chunk never run at the same time."""
        if self._steps is None:
            arguments = self._call.arguments(self.index)
            self._steps = self._program.start(*arguments)
        self.reads = ()  # else they would outlive their last use in the group
        self.reads = next(self._steps)

    def keep(self) -> None:
        """Hand the outputs over, after the last group."""
        self._call.keep(self.index, self.reads)
        self.reads, self._steps = (), None


def chunk_runs(program: TaskProgram, call: LoopCall) -> list[ChunkRun]:
    """Return all chunks of ``call``, none of them begun."""
    return [ChunkRun(program, call, index) for index in range(len(call.pasts))]
