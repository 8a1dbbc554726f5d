"""Times the steps of an executor, to fit a `StepCost` from."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

from torch import Tensor

from graphopt.runtime.engine.batch import Executor, Piece
from graphopt.runtime.engine.simulator.cost import Load


class TimedExecutor:
    """Runs pieces on another executor and keeps the loads and seconds of each run.

    ``measured`` is what `fit_cost` takes; the first steps of an executor that compiles
    are best deleted from it.
    """

    def __init__(
        self, executor: Executor, clock: Callable[[], float] = time.perf_counter
    ) -> None:
        self.measured: list[tuple[list[Load], float]] = []
        self._executor = executor
        self._clock = clock

    @property
    def pages(self) -> int:
        """Return the number of pages."""
        return self._executor.pages

    @property
    def page_size(self) -> int:
        """Return the tokens of a page."""
        return self._executor.page_size

    def run(self, pieces: Sequence[Piece]) -> Tensor:
        """Run the pieces, and wait until the device has."""
        start = self._clock()
        logits = self._executor.run(pieces)
        logits.sum().item()  # a step without logits is waited for too
        seconds = self._clock() - start
        self.measured.append(([Load.of(piece) for piece in pieces], seconds))
        return logits
