"""When each stage of a pipeline runs which micro-batch, and how long it idles."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Passage:
    """One micro-batch through all stages; ``bubble`` is the time they waited for it."""

    end: float
    bubble: float


class Pipeline:
    """Stages of equal shares of the layers, each one micro-batch at a time."""

    def __init__(self, stages: int) -> None:
        self._free = [0.0] * stages
        self._used = [False] * stages

    @property
    def stages(self) -> int:
        """Return the number of stages."""
        return len(self._free)

    @property
    def free_at(self) -> float:
        """Return when the first stage can take the next micro-batch."""
        return self._free[0]

    def run(self, start: float, seconds: float, fed: float) -> Passage:
        """Send a micro-batch through: ``seconds`` are those of all stages together.

        A stage's wait for it is a bubble as far as requests for all micro-batches were
        there, ``fed`` being since when: infinity where they are not.
        """
        bubble, at = 0.0, start
        for stage, free in enumerate(self._free):
            begin = max(at, free)
            if self._used[stage]:
                bubble += begin - min(begin, max(free, fed))
            at = begin + seconds / self.stages
            self._free[stage], self._used[stage] = at, True
        return Passage(at, bubble)
