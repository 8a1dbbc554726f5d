"""Runs a step although some of its requests cannot run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from graphopt.runtime.engine.batch import Executor, Piece, PieceError
from graphopt.runtime.engine.sampling import likeliest


@dataclass(frozen=True)
class Row:
    """The logits [V] of a request, and their likeliest token (None: no numbers)."""

    logits: Tensor
    likeliest: int | None


@dataclass(frozen=True)
class Outcome:
    """The row of each request that samples, and why others failed."""

    rows: dict[int, Row]
    failures: dict[int, Exception]


def run_pieces(executor: Executor, pieces: Sequence[Piece]) -> Outcome:
    """Run a step; where it raises, find whose fault it is and run the others.

    A `PieceError` names the request. For any other exception the step is halved until
    it runs or one piece is left, which is at fault then. So a fault that needs several
    pieces, such as lack of memory, fails nobody.
    """
    failures: dict[int, Exception] = {}
    while pieces:
        try:
            return Outcome(_run(executor, pieces), failures)
        except PieceError as error:
            others = [piece for piece in pieces if piece.request != error.request]
            if len(others) == len(pieces):
                return _halve(executor, pieces, failures, error)
            failures[error.request] = error
            pieces = others
        except Exception as error:
            return _halve(executor, pieces, failures, error)
    return Outcome({}, failures)


def _halve(
    executor: Executor,
    pieces: Sequence[Piece],
    failures: dict[int, Exception],
    error: Exception,
) -> Outcome:
    if len(pieces) == 1:
        return Outcome({}, {**failures, pieces[0].request: error})
    middle = len(pieces) // 2
    one = run_pieces(executor, pieces[:middle])
    other = run_pieces(executor, pieces[middle:])
    return Outcome(
        {**one.rows, **other.rows}, {**failures, **one.failures, **other.failures}
    )


def _run(executor: Executor, pieces: Sequence[Piece]) -> dict[int, Row]:
    sampling = [piece.request for piece in pieces if piece.samples]
    logits = executor.run(pieces)
    if logits.ndim != 2 or len(logits) != len(sampling):
        raise RuntimeError(
            f"the executor returned logits of shape {list(logits.shape)} for "
            f"{len(sampling)} pieces that sample; [{len(sampling)}, V] is wanted"
        )
    # Reading the tokens waits for the device, whose errors belong to this run.
    rows = map(Row, logits, likeliest(logits))
    return dict(zip(sampling, rows, strict=True))
