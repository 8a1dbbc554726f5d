"""A request as the schedulers know it: how long it is, what it holds, what it does."""

from __future__ import annotations

from abc import ABC, abstractmethod
from enum import Enum


class State(Enum):
    """Where a request stands; the last three are ends."""

    WAITING = "waiting"
    PREFILLING = "prefilling"
    DECODING = "decoding"
    FINISHED = "finished"
    FAILED = "failed"
    CANCELLED = "cancelled"

    @property
    def ended(self) -> bool:
        """Tell whether nothing follows."""
        return not _NEXT[self]


_ENDS = {State.FINISHED, State.FAILED, State.CANCELLED}
_NEXT: dict[State, set[State]] = {
    State.WAITING: {State.PREFILLING, *_ENDS},
    State.PREFILLING: {State.WAITING, State.DECODING, *_ENDS},
    State.DECODING: {State.WAITING, *_ENDS},
    **{end: set() for end in _ENDS},
}


class Job(ABC):
    """What the engine's and the simulator's requests have in common.

    ``id`` counts in order of arrival. ``past`` tokens are in ``pages``; ``served`` is
    the number of the step that last ran it.
    """

    def __init__(self, id: int) -> None:
        self.id = id
        self.past = 0
        self.pages: list[int] = []
        self.served = 0
        self.preemptions = 0
        self.shared = 0  # tokens found in pages when it was admitted
        self._state = State.WAITING

    @property
    @abstractmethod
    def length(self) -> int:
        """Return how many tokens are known, the prompt's and new ones."""

    @abstractmethod
    def content(self, start: int, stop: int) -> tuple[int, ...]:
        """Return the tokens of [start, stop)."""

    @property
    def state(self) -> State:
        """Return where the request stands."""
        return self._state

    def move(self, state: State) -> None:
        """Go to the next state; raises AssertionError for one that cannot follow."""
        assert state in _NEXT[self._state], f"{self._state} -> {state}"
        self._state = state
