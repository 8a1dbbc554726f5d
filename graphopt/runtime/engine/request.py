"""A request of the engine: its tokens, its text, and how it ended."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from graphopt.errors import GraphoptError
from graphopt.runtime.engine.job import Job, State
from graphopt.runtime.engine.sampling import Sampler, SamplingParams
from graphopt.runtime.engine.statistics import RequestStatistics
from graphopt.runtime.engine.stops import TextStream

Reason = Literal["stop", "length", "cancelled"]


class RequestError(GraphoptError):
    """A request that cannot be taken, or that failed."""


class Request(Job):
    """One request: ``tokens`` are those of the prompt and behind them the new ones."""

    def __init__(
        self,
        id: int,
        prompt: Sequence[int],
        params: SamplingParams,
        end_ids: frozenset[int],
        text: TextStream | None,
        arrival: float,
    ) -> None:
        super().__init__(id)
        self.tokens = list(prompt)
        self.prompt_length = len(self.tokens)
        self.params = params
        self.sampler = Sampler(params, end_ids)
        self.text = text
        self.reason: Reason | None = None
        self.error: RequestError | None = None
        self._end_ids = end_ids
        self._arrival = arrival
        self._times: list[float] = []

    @property
    def length(self) -> int:
        """Return how many tokens are known."""
        return len(self.tokens)

    @property
    def drawn(self) -> int:
        """Return how many new tokens there are."""
        return len(self.tokens) - self.prompt_length

    @property
    def statistics(self) -> RequestStatistics:
        """Return its times up to now."""
        return RequestStatistics(
            self._arrival, tuple(self._times), self.preemptions, self.shared
        )

    def content(self, start: int, stop: int) -> tuple[int, ...]:
        """Return the tokens of [start, stop)."""
        return tuple(self.tokens[start:stop])

    def accept(self, token: int, now: float) -> None:
        """Take the next token, and finish if it is the last one."""
        self.tokens.append(token)
        self._times.append(now)
        self.reason = self._end(token)
        if self.reason is None:
            if self.state is State.PREFILLING:
                self.move(State.DECODING)
            return
        if self.text is not None and self.text.finish():
            self.reason = "stop"
        self.move(State.FINISHED)

    def _end(self, token: int) -> Reason | None:
        may_stop = self.drawn > self.params.min_new_tokens
        if token in self._end_ids:
            return "stop"
        if self.text is not None and self.text.push(token, may_stop):
            return "stop"
        return "length" if self.drawn == self.params.max_new_tokens else None

    def fail(self, cause: Exception, step: int) -> None:
        """End with an error."""
        name = type(cause).__name__
        self.error = RequestError(
            f"request {self.id} failed in step {step}: {name}: {cause}; "
            "the engine goes on with the others"
        )
        self.error.__cause__ = cause
        self.move(State.FAILED)

    def cancel(self) -> None:
        """End because nobody wants it any more."""
        self.reason = "cancelled"
        self.move(State.CANCELLED)
