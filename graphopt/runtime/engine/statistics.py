"""What a step did, and how long a request waited for its tokens."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise


@dataclass(frozen=True)
class StepStatistics:
    """One step: requests, tokens and pages in numbers, its time in seconds.

    ``seconds`` is the executor's time and that of drawing tokens; ``free_pages`` are
    those behind the step.
    """

    step: int
    tokens: int
    decodes: int
    chunks: int
    preempted: int
    failed: int
    ended: int
    free_pages: int
    seconds: float


@dataclass(frozen=True)
class RequestStatistics:
    """One request; times in seconds of the engine's clock.

    ``token_times`` holds when each of its tokens was there; ``shared_tokens`` of its
    prompt were in pages already when it was admitted last.
    """

    arrival: float
    token_times: tuple[float, ...]
    preemptions: int
    shared_tokens: int

    @property
    def time_to_first_token(self) -> float | None:
        """Return the seconds from arrival to the first token; None before it."""
        return self.token_times[0] - self.arrival if self.token_times else None

    @property
    def times_between_tokens(self) -> list[float]:
        """Return the seconds between each two tokens."""
        return [after - before for before, after in pairwise(self.token_times)]
