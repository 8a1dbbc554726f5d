"""What a scheduler sees, and what it answers."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Protocol


@dataclass(frozen=True)
class Limits:
    """What bounds a step; ``budget``, ``tile`` and ``chunk_limit`` in tokens.

    ``chunk_limit`` is the most that one prompt gets while another waits for its turn.
    """

    budget: int
    tile: int
    max_running: int
    page_size: int
    chunk_limit: int | None = None

    def pages(self, tokens: int) -> int:
        """Return how many pages hold so many tokens."""
        return -(-tokens // self.page_size)


@dataclass(frozen=True, eq=False)
class View:
    """One request: ``past`` of its ``length`` known tokens are in ``pages``.

    A waiting request's pages are those that hold its first tokens already.
    """

    request: int
    length: int
    past: int
    decoding: bool
    served: int
    pages: Sequence[int]

    @property
    def pending(self) -> int:
        """Return the tokens to run until the next one can be sampled."""
        return self.length - self.past


@dataclass(frozen=True)
class Board:
    """All requests in order of arrival, and the pages that are free.

    ``waiting`` is read once, and no further than needed: finding the pages of a
    waiting request takes time. ``holders`` tells how many requests hold a page.
    """

    running: Sequence[View]
    waiting: Iterable[View]
    free: int
    holders: Callable[[int], int]
    limits: Limits


@dataclass(frozen=True)
class Plan:
    """The tokens that each request runs, and who gives its pages back before."""

    shares: dict[int, int]
    preempted: tuple[int, ...] = ()


class Scheduler(Protocol):
    """Decides a step. A waiting request with a share is admitted by it."""

    def plan(self, board: Board) -> Plan:
        """Return the next step; it is not empty where there are requests."""
        ...
