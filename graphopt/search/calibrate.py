"""Equal cost: the size at which a candidate takes the budget's time, measured.

FLOPs are no measure of it: scattered diagonals cost a whole tile each, and selection
costs what it costs. MInference equalises FLOPs (Jiang et al. 2024, Algorithm 1); here
the kernels themselves are timed, on the model's own queries and keys.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from graphopt.errors import ConfigError
from graphopt.search.candidates import Candidate
from graphopt.search.layer import LayerAttention

TOLERANCE = 0.1
_STEPS = 12
_A_SHAPE = re.compile(r"a-shape:(\d+):(\d+)")


@dataclass(frozen=True)
class Budget:
    """A share of dense attention's time, or the time of A-shape(sink, window)."""

    text: str
    share: float | None = None
    a_shape: tuple[int, int] | None = None

    def seconds(self, layer: LayerAttention) -> float:
        """Measure it."""
        if self.a_shape is None:
            assert self.share is not None
            return self.share * layer.dense_seconds()
        sink, window = self.a_shape
        return layer.seconds({"pattern": "a-shape", "sink": sink, "window": window})


def parse_budget(text: str) -> Budget:
    """Read ``0.35`` or ``a-shape:SINK:WINDOW``; ConfigError for anything else."""
    if match := _A_SHAPE.fullmatch(text):
        sink, window = map(int, match.groups())
        if window > 0:
            return Budget(text, a_shape=(sink, window))
    try:
        share = float(text)
    except ValueError:
        share = -1.0
    if not 0 < share < 1:
        raise ConfigError(
            f"--budget {text}: give a share of dense attention's time between 0 and 1, "
            "such as 0.35, or a-shape:SINK:WINDOW in tokens"
        )
    return Budget(text, share=share)


def calibrate(
    layer: LayerAttention, candidate: Candidate, budget: float, tokens: int
) -> dict[str, Any]:
    """Return ``options`` and their ``seconds`` near ``budget``, or why there are none.

    Bisection over the size until the time is within a tenth of the budget; once more
    where it missed, for other work on the machine may have misled it.
    """

    def cost(size: int) -> float:
        return layer.seconds(candidate.options(size))

    for _ in range(2):
        size, seconds = bisect(cost, candidate.largest(tokens), budget)
        if abs(seconds / budget - 1) <= TOLERANCE:
            break
    if abs(seconds / budget - 1) > TOLERANCE:
        return {
            "reason": f"takes {seconds:.3f} s at size {size}, the nearest to "
            f"{budget:.3f} s that was found"
        }
    return {"options": candidate.options(size), "seconds": round(seconds, 4)}


def bisect(
    cost: Callable[[int], float], largest: int, budget: float
) -> tuple[int, float]:
    """Return (size, cost) of the size in [1, largest] whose cost is nearest ``budget``.

    Stops early within the tolerance. ``cost`` grows with the size, up to noise.
    """
    low, high = 1, largest
    tried: dict[int, float] = {}
    while low <= high and len(tried) < _STEPS:
        size = (low + high) // 2
        tried[size] = cost(size)
        if abs(tried[size] / budget - 1) <= TOLERANCE:
            return size, tried[size]
        if tried[size] > budget:
            high = size - 1
        else:
            low = size + 1
    best = min(tried, key=lambda s: abs(tried[s] - budget))
    return best, tried[best]


def check_sizes(sizes: Mapping[str, Any], known: tuple[Candidate, ...]) -> None:
    """Raise ConfigError for recorded sizes of a candidate that is not known here."""
    names = {c.name for c in known}
    for name in sizes:
        if name not in names:
            raise ConfigError(
                f"--sizes: candidate '{name}' is unknown to this version; known: "
                f"{', '.join(sorted(names))}"
            )
