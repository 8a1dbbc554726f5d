"""What a simulation found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch


@dataclass(frozen=True)
class Served:
    """One request; times in seconds, ``bubble`` the sum over its micro-batches."""

    arrival: float
    token_times: tuple[float, ...]
    preemptions: int
    bubble: float


@dataclass(frozen=True)
class Report:
    """All requests of a simulation, its tokens (prompts and new) and its seconds."""

    served: tuple[Served, ...]
    tokens: int
    seconds: float
    steps: int
    bubble_seconds: float
    stages: int

    @property
    def throughput(self) -> float:
        """Return the tokens a second, of prompts and new."""
        return self.tokens / self.seconds

    @property
    def bubble_share(self) -> float:
        """Return the share of the stages' time that they waited."""
        return self.bubble_seconds / (self.stages * self.seconds)

    def time_to_first_token(self, share: float = 0.5) -> float:
        """Return the time that this share of the requests did not wait longer."""
        return _quantile([s.token_times[0] - s.arrival for s in self.served], share)

    def time_between_tokens(self, share: float = 0.5) -> float:
        """Return the time that this share of the tokens did not take longer."""
        gaps = [b - a for s in self.served for a, b in pairwise(s.token_times)]
        return _quantile(gaps, share)

    def bubble(self, share: float = 0.5) -> float:
        """Return the bubble seconds that this share of the requests did not exceed."""
        return _quantile([served.bubble for served in self.served], share)


def _quantile(values: Sequence[float], share: float) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(share))
