"""What a step runs, and the interface of what runs it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor


@dataclass(frozen=True)
class Piece:
    """The part of one request that one step runs: a chunk of its prompt or a token.

    ``tokens`` are new in this step and stand behind ``past`` tokens that pages hold
    already. ``pages`` is the request's page table: numbers of pool pages that cover
    ``past + len(tokens)`` tokens, in order. Full pages before ``past`` may be other
    requests' too and are read only; a table may name other pages of equal content in a
    later step. ``samples`` asks for the logits of the last token.
    """

    request: int
    tokens: tuple[int, ...]
    past: int
    pages: tuple[int, ...]
    samples: bool


class PieceError(Exception):
    """What an executor raises when one request of a step cannot run."""

    def __init__(self, request: int, message: str = "") -> None:
        super().__init__(message or f"request {request} cannot run")
        self.request = request


class Executor(Protocol):
    """Runs the pieces of a step and owns the tensors of the pool.

    ``pages`` is the number of pool pages, numbered from zero, of ``page_size`` tokens.
    """

    @property
    def pages(self) -> int:
        """Return the number of pages."""
        ...

    @property
    def page_size(self) -> int:
        """Return the tokens of a page."""
        ...

    def run(self, pieces: Sequence[Piece]) -> Tensor:
        """Run all pieces; return the logits [pieces that sample, V] in their order.

        The keys and values of the new tokens are in the pages afterwards. A run that
        raised is repeated with fewer pieces, so it may have written only to the
        places of the new tokens. Raises `PieceError` for the fault of one request,
        anything else for a fault that it cannot lay at one's door.
        """
        ...
