"""What a machine does for a scheduler: runs chunks in order, and out of order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from graphopt.runtime.schedule.dag import Dag
from graphopt.runtime.schedule.policies import Processor
from graphopt.runtime.schedule.program import ChunkRun
from graphopt.runtime.schedule.simulator import Timeline


class Machine(Protocol):
    """Processors that run op groups of chunks; seconds are by chunk and position."""

    @property
    def processors(self) -> tuple[Processor, ...]:
        """Return what runs tasks beside one another."""

    def in_order(self, runs: Sequence[ChunkRun], groups: int) -> None:
        """Run one chunk after the other with all of the machine."""

    def timed(self, runs: Sequence[ChunkRun], groups: int) -> list[list[float]]:
        """Do the same and return the seconds of every group."""

    def timed_alone(self, runs: Sequence[ChunkRun], groups: int) -> list[list[float]]:
        """Do the same on one of the processors, with the share of it."""

    def out_of_order(
        self, runs: Sequence[ChunkRun], dag: Dag, timeline: Timeline
    ) -> None:
        """Run all tasks as ``timeline`` has them; not waited for on a device."""

    def seconds(self, runs: Sequence[ChunkRun], dag: Dag, timeline: Timeline) -> float:
        """Do the same, wait for it, and return how long it took."""
