"""The patterns that the search tries on every head, as data.

Each has one size, which calibration sets so that all cost the same measured time. An
option is a multiple of the size, or stays as it is. Sizes are in tokens, except that
antidiagonal's is the threshold in thousandths.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from graphopt.passes.attention.heads import Pattern


@dataclass(frozen=True)
class Candidate:
    """One pattern of the pass ``sparse-attention``.

    ``fixed``: options that do not change; ``scaled``: option -> its share of the size,
    rounded to ``multiple``, at least one of them. ``highest``: largest size, None for
    the prompt's length.
    """

    name: str
    pattern: str
    scaled: Mapping[str, float]
    fixed: Mapping[str, Any] = field(default_factory=dict)
    multiple: int = 1
    highest: int | None = None
    fraction: bool = False

    def options(self, size: int) -> dict[str, Any]:
        """Return the pass's options at ``size``, in the order of the table's rows."""
        scaled = {k: self._value(share * size) for k, share in self.scaled.items()}
        return {"pattern": self.pattern, **self.fixed, **scaled}

    def _value(self, value: float) -> int | float:
        if self.fraction:
            return round(value, 3)
        return max(round(value / self.multiple), 1) * self.multiple

    def largest(self, tokens: int) -> int:
        """Return the largest size that means something at ``tokens``."""
        return tokens if self.highest is None else self.highest


_ALL = (
    Candidate("a-shape", "a-shape", {"window": 1.0}, {"sink": 128}),
    Candidate("streaming", "streaming", {"window": 1.0}, {"sink": 64}, multiple=64),
    # Mostly columns, mostly diagonals, some of both, and few of both in a wide window.
    Candidate("columns", "vertical-slash", {"vertical": 1.0, "slash": 0.02},
              {"sink": 30, "window": 128}),
    Candidate("diagonals", "vertical-slash", {"vertical": 0.1, "slash": 0.3},
              {"sink": 30, "window": 128}),
    Candidate("both", "vertical-slash", {"vertical": 0.6, "slash": 0.1},
              {"sink": 30, "window": 256}),
    Candidate("wide-window", "vertical-slash",
              {"window": 1.0, "vertical": 0.5, "slash": 0.05}, {"sink": 64}),
    Candidate("block-sparse", "block-sparse", {"blocks": 1 / 64}),
    Candidate("antidiagonal", "antidiagonal", {"threshold": 0.001}, {"stride": 16},
              highest=1000, fraction=True),
)  # fmt: skip


def candidates() -> tuple[Candidate, ...]:
    """Return the candidates whose pattern the pass knows."""
    known = get_args(Pattern)
    return tuple(c for c in _ALL if c.pattern in known)
