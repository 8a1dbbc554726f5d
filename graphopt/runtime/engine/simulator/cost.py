"""How long a step takes, as a function of what it runs; fitted from measured steps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.errors import GraphoptError
from graphopt.runtime.engine.batch import Piece


@dataclass(frozen=True)
class Load:
    """What one request adds to a step: ``new`` tokens behind ``past`` ones."""

    past: int
    new: int

    @staticmethod
    def of(piece: Piece) -> Load:
        """Return the load of a piece."""
        return Load(piece.past, len(piece.tokens))


Measured = Sequence[tuple[Sequence[Load], float]]
_TERMS = ("constant", "per_token", "per_past", "per_pair")
_VARIES = {
    "constant": "steps",
    "per_token": "steps of different numbers of tokens (in tiles)",
    "per_past": "decodes behind different numbers of tokens",
    "per_pair": "chunks of different lengths",
}


@dataclass(frozen=True)
class StepCost:
    """Seconds of a step: ``c + g t + b p + a s``.

    ``t`` is the tokens of the step, rounded up to ``tile``; ``p`` the sum of past
    tokens over the decodes; ``s`` the sum over chunks of ``2 past new + new^2``, twice
    the pairs of tokens that attend. The form is that of ROCm/ATOM, pull request 2007,
    with tiles as measured in SARATHI (arXiv 2308.16369), section 4.4.
    """

    constant: float
    per_token: float
    per_past: float = 0.0
    per_pair: float = 0.0
    tile: int = 1

    def seconds(self, loads: Iterable[Load]) -> float:
        """Return the time of a step."""
        weights = (self.constant, self.per_token, self.per_past, self.per_pair)
        counts = _counts(loads, self.tile)
        return sum(w * n for w, n in zip(weights, counts, strict=True))

    def errors(self, measured: Measured) -> list[float]:
        """Return the relative error of each measured step: predicted / measured - 1."""
        return [self.seconds(loads) / seconds - 1 for loads, seconds in measured]


def _counts(loads: Iterable[Load], tile: int) -> tuple[int, int, int, int]:
    tokens = past = pairs = 0
    for load in loads:
        tokens += load.new
        if load.new == 1:
            past += load.past
        else:
            pairs += 2 * load.past * load.new + load.new**2
    return 1, -(-tokens // tile) * tile, past, pairs


def fit_cost(measured: Measured, tile: int) -> StepCost:
    """Return the cost whose relative errors have the least squares, none negative.

    measured: loads and seconds of steps. Raises GraphoptError where they do not vary
    enough to tell the terms apart.
    """
    rows = [_counts(loads, tile) for loads, _ in measured]
    seconds = torch.tensor([s for _, s in measured], dtype=torch.float64)
    counts = torch.tensor(rows, dtype=torch.float64).reshape(-1, len(_TERMS))
    # Divided by the seconds, a row's error is relative; by the norms, a column's
    # weight does not depend on its unit.
    system = counts / seconds[:, None]
    norms = system.norm(dim=0)
    _check_rank(system / norms.clamp(min=1e-300))
    weights = _nonnegative(system / norms) / norms
    return StepCost(**dict(zip(_TERMS, weights.tolist(), strict=True)), tile=tile)


def _nonnegative(system: Tensor) -> Tensor:
    """Return weights >= 0 [N] that bring ``system`` [M, N] nearest to ones."""
    kept = list(range(system.shape[1]))
    ones = torch.ones(len(system), 1, dtype=system.dtype)
    while True:
        solution = torch.linalg.lstsq(system[:, kept], ones).solution[:, 0]
        worst = int(solution.argmin())
        if solution[worst] >= 0:
            break
        del kept[worst]
    weights = torch.zeros(system.shape[1], dtype=system.dtype)
    weights[kept] = solution
    return weights


def _check_rank(system: Tensor) -> None:
    for number, term in enumerate(_TERMS, start=1):
        part = system[:, :number]
        rank = int(torch.linalg.matrix_rank(part, rtol=1e-8)) if len(part) else 0
        if rank < number:
            raise GraphoptError(
                f"{len(system)} measured steps do not tell '{term}' from the terms "
                f"before it; measure {_VARIES[term]}"
            )
