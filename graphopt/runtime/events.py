"""A queue of what happens when: the clock of the discrete-event simulators."""

from __future__ import annotations

import heapq
from itertools import count
from typing import Generic, TypeVar

Item = TypeVar("Item")


class EventQueue(Generic[Item]):
    """Items by time; those of the same time in the order in which they were put in."""

    def __init__(self) -> None:
        self._events: list[tuple[float, int, Item]] = []
        self._order = count()

    def __bool__(self) -> bool:
        return bool(self._events)

    @property
    def next_time(self) -> float:
        """Return the time of the next item; infinity when there is none."""
        return self._events[0][0] if self._events else float("inf")

    def push(self, time: float, item: Item) -> None:
        """Let ``item`` happen at ``time``."""
        heapq.heappush(self._events, (time, next(self._order), item))

    def pop(self) -> tuple[float, Item]:
        """Return the next item and its time."""
        time, _, item = heapq.heappop(self._events)
        return time, item
