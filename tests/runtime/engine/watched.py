"""An executor that checks every page it is given, and fails when told to."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from graphopt.runtime.engine import Piece, PieceError
from tests.runtime.engine.dense_executor import DenseExecutor

FAULTS = ("named", "misnamed", "unnamed", "company", "nan")


class WatchedExecutor(DenseExecutor):
    """Keeps, beside keys and values, which tokens of which prefix a page holds.

    ``faults`` says by request how its next piece fails: ``named`` by a `PieceError`,
    ``misnamed`` by one of no request, ``unnamed`` by another one, ``company`` only if
    it is not alone, ``nan`` by its logits. ``runs`` holds the pieces of all runs since
    a test last cleared it.
    """

    def __init__(self, pages: int, page_size: int = 64) -> None:
        super().__init__(pages, page_size)
        self.faults: dict[int, str] = {}
        self.runs: list[list[Piece]] = []
        self._texts: dict[int, list[int]] = {}  # of each request, as pieces gave it
        self._holds: dict[int, tuple[int, ...]] = {}  # all tokens up to a page's last

    def run(self, pieces: Sequence[Piece]) -> Tensor:
        self.runs.append(list(pieces))
        self._check_written_by_one(pieces)
        for piece in pieces:
            self._check_read(piece)
        self._raise(pieces)
        logits = super().run(pieces)
        for piece in pieces:
            self._note(piece)
        sampling = [piece.request for piece in pieces if piece.samples]
        for row, request in enumerate(sampling):
            if self.faults.get(request) == "nan":
                logits[row] = float("nan")
        return logits

    def _check_written_by_one(self, pieces: Sequence[Piece]) -> None:
        assert len({piece.request for piece in pieces}) == len(pieces)
        written = [page for piece in pieces for page in self._written(piece)]
        named = [page for piece in pieces for page in piece.pages]
        assert all(named.count(page) == 1 for page in written)

    def _written(self, piece: Piece) -> Sequence[int]:
        end = piece.past + len(piece.tokens)
        assert len(piece.pages) == -(-end // self.page_size)
        return piece.pages[piece.past // self.page_size :]

    def _check_read(self, piece: Piece) -> None:
        """The pages hold the tokens before the piece: shared ones those of others."""
        held: tuple[int, ...] = ()
        for index in range(-(-piece.past // self.page_size)):
            text = self._holds[piece.pages[index]]
            assert text[: len(held)] == held
            held = text
        known = self._texts.get(piece.request, [])
        both = min(len(known), piece.past)
        assert len(held) >= piece.past
        assert list(held[:both]) == known[:both]

    def _raise(self, pieces: Sequence[Piece]) -> None:
        for piece in pieces:
            fault = self.faults.get(piece.request)
            if fault == "named":
                raise PieceError(piece.request, "no such token")
            if fault == "misnamed":
                raise PieceError(-1, "no such request")
            if fault == "unnamed" or (fault == "company" and len(pieces) > 1):
                raise RuntimeError("device fault")

    def _note(self, piece: Piece) -> None:
        size = self.page_size
        before = (
            self._holds[piece.pages[(piece.past - 1) // size]] if piece.past else ()
        )
        text = [*before[: piece.past], *piece.tokens]
        self._texts[piece.request] = text
        for index in range(piece.past // size, len(piece.pages)):
            self._holds[piece.pages[index]] = tuple(text[: (index + 1) * size])
