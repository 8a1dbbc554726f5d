"""Hands tasks to the threads that run them, in the order of a plan."""

from __future__ import annotations

import threading
from bisect import insort
from collections.abc import Sequence

from graphopt.runtime.schedule.dag import Dag
from graphopt.runtime.schedule.policies import State


class Board:
    """The tasks of ``dag`` that are ready, those first that come first in ``order``.

    A thread whose next task is not ready takes the one behind it: what was measured
    differs a little from run to run, and to wait for the plan would lose that time.
    Every method may be called from any thread.
    """

    def __init__(self, dag: Dag, order: Sequence[int]) -> None:
        self._dag, self._state = dag, State(dag)
        self._rank = {task: place for place, task in enumerate(order)}
        self._ready: list[int] = []  # places in the order
        self._left = len(dag.tasks)
        self._changed = threading.Condition()
        self._error: BaseException | None = None
        self._post([task for task, needed in enumerate(dag.needs) if not needed])
        self._order = order

    def _post(self, tasks: Sequence[int]) -> None:
        for task in tasks:
            insort(self._ready, self._rank[task])

    def take(self, processor: str) -> int | None:
        """Return a task for ``processor``, once there is one; None when all is done."""
        with self._changed:
            while self._left and self._error is None:
                if (task := self._first(processor)) is not None:
                    self._left -= 1
                    return task
                self._changed.wait()
        return None

    def _first(self, processor: str) -> int | None:
        for place in self._ready:
            if self._dag.tasks[self._order[place]].runs_on(processor):
                self._ready.remove(place)
                return self._order[place]
        return None

    def end(self, task: int) -> None:
        """Note that ``task`` has ended."""
        with self._changed:
            self._post(self._state.end(task))
            self._changed.notify_all()

    def fail(self, error: BaseException) -> None:
        """Stop: no more tasks are handed out, and `check` raises the first error."""
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def check(self) -> None:
        """Raise what stopped the run, if something did."""
        if self._error is not None:
            raise self._error
