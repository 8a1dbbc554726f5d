"""What a caller holds of a request: its tokens as they come, and its end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

from graphopt.runtime.engine.job import State
from graphopt.runtime.engine.request import Reason, Request, RequestError
from graphopt.runtime.engine.statistics import RequestStatistics

if TYPE_CHECKING:
    from graphopt.runtime.engine.engine import Engine

T = TypeVar("T")


@dataclass(frozen=True)
class Result:
    """What a request gave; ``text`` where the engine has a tokenizer.

    ``tokens`` are the new ones, with the one that ended it, as ``generate`` returns
    them; ``text`` is without stop string or end token.
    """

    tokens: list[int]
    text: str | None
    reason: Reason
    statistics: RequestStatistics


class Handle:
    """One submitted request. Iterating gives its new tokens and runs the engine."""

    def __init__(self, engine: Engine, request: Request) -> None:
        self._engine = engine
        self.request = request

    @property
    def id(self) -> int:
        """Return the request's number, in order of arrival."""
        return self.request.id

    @property
    def state(self) -> State:
        """Return where it stands."""
        return self.request.state

    @property
    def tokens(self) -> list[int]:
        """Return the new tokens up to now."""
        return self.request.tokens[self.request.prompt_length :]

    @property
    def error(self) -> RequestError | None:
        """Return why it failed; None where it did not."""
        return self.request.error

    @property
    def statistics(self) -> RequestStatistics:
        """Return its times up to now."""
        return self.request.statistics

    def __iter__(self) -> Iterator[int]:
        """Yield each new token, running steps until there is one.

        Raises RequestError behind the last token of a request that failed.
        """
        return self._follow(self.request.tokens, self.request.prompt_length)

    def text(self) -> Iterator[str]:
        """Yield the new text as it comes, in parts; errors as in iterating.

        Raises RequestError at once where the engine has no tokenizer.
        """
        stream = self.request.text
        if stream is None:
            raise RequestError(
                f"request {self.id} has no text: the engine has no tokenizer; "
                "give it one, or iterate over the tokens"
            )
        return self._follow(stream.parts, 0)

    def _follow(self, items: list[T], given: int) -> Iterator[T]:
        """Yield the items of a growing list behind the first ``given``."""
        while True:
            ended = self.state.ended
            new = items[given:]
            given += len(new)
            yield from new
            if ended:
                break
            self._engine.step()
        self._raise()

    def result(self) -> Result:
        """Run the engine until the request ends, and return what it gave.

        A cancelled request gives what there is. Raises RequestError if it failed.
        """
        while not self.state.ended:
            self._engine.step()
        self._raise()
        reason, text = self.request.reason, self.request.text
        assert reason is not None
        shown = None if text is None else "".join(text.parts)
        return Result(self.tokens, shown, reason, self.statistics)

    def cancel(self) -> bool:
        """End the request and free its pages; False if it had ended before."""
        return self._engine.cancel(self)

    def _raise(self) -> None:
        if self.request.error is not None:
            raise self.request.error
