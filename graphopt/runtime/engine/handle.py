"""What a caller holds of a request: its tokens as they come, and its end."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from graphopt.runtime.engine.job import State
from graphopt.runtime.engine.request import Reason, Request, RequestError
from graphopt.runtime.engine.statistics import RequestStatistics

if TYPE_CHECKING:
    from graphopt.runtime.engine.engine import Engine


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
        self._request = request

    @property
    def id(self) -> int:
        """Return the request's number, in order of arrival."""
        return self._request.id

    @property
    def state(self) -> State:
        """Return where it stands."""
        return self._request.state

    @property
    def tokens(self) -> list[int]:
        """Return the new tokens up to now."""
        return self._request.tokens[self._request.prompt_length :]

    @property
    def error(self) -> RequestError | None:
        """Return why it failed; None where it did not."""
        return self._request.error

    @property
    def statistics(self) -> RequestStatistics:
        """Return its times up to now."""
        return self._request.statistics

    def __iter__(self) -> Iterator[int]:
        """Yield each new token, running steps until there is one.

        Raises RequestError behind the last token of a request that failed.
        """
        given = 0
        while True:
            ended = self.state.ended
            tokens = self.tokens[given:]
            given += len(tokens)
            yield from tokens
            if ended:
                break
            self._engine.step()
        self._raise()

    def text(self) -> Iterator[str]:
        """Yield the new text as it comes, in parts; errors as in iterating.

        Raises RequestError at once where the engine has no tokenizer.
        """
        stream = self._request.text
        if stream is None:
            raise RequestError(
                f"request {self.id} has no text: the engine has no tokenizer; "
                "give it one, or iterate over the tokens"
            )
        return self._text(stream.parts)

    def _text(self, parts: list[str]) -> Iterator[str]:
        given = 0
        while True:
            ended = self.state.ended
            new = parts[given:]
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
        reason, text = self._request.reason, self._request.text
        assert reason is not None
        shown = None if text is None else "".join(text.parts)
        return Result(self.tokens, shown, reason, self.statistics)

    def cancel(self) -> bool:
        """End the request and free its pages; False if it had ended before."""
        return self._engine.cancel(self._request)

    def _raise(self) -> None:
        if self._request.error is not None:
            raise self._request.error
