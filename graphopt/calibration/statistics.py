"""Statistics of activations that add up over texts."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

_PER_OCTAVE = 32  # a bin's ends differ by 2 %
_LOWEST, _HIGHEST = -24, 24  # powers of two between which magnitudes are told apart
BINS = (_HIGHEST - _LOWEST) * _PER_OCTAVE + 1


@dataclass
class Magnitudes:
    """A histogram of absolute values: ``counts`` int64 [`BINS`].

    Bins grow with the value, 32 a factor of two, so that no range need be known when
    counting begins; bin 0 holds what is
    smaller than 2^-24, zeros too, and the last one what is greater than 2^24.
    """

    counts: Tensor = field(default_factory=lambda: torch.zeros(BINS, dtype=torch.int64))

    def add(self, values: Tensor) -> None:
        """Count ``values``, of any shape; ValueError where they are not finite."""
        logs = values.detach().float().abs().log2_().flatten()
        if bool((logs.isnan() | (logs == torch.inf)).any()):
            raise ValueError("the model computes values that are no finite numbers")
        bins = ((logs - _LOWEST) * _PER_OCTAVE).add_(1).clamp_(0, BINS - 1)
        self.counts += torch.bincount(bins.long().cpu(), minlength=BINS)

    def quantile(self, share: float) -> float:
        """Return the value that ``share`` (0..1) of all magnitudes do not exceed.

        Exact up to a bin; within one, values are taken as evenly spread. 0.0 without
        any values.
        """
        total = int(self.counts.sum())
        if total == 0:
            return 0.0
        wanted = share * total
        below = self.counts.cumsum(0)
        index = int(torch.searchsorted(below.double(), wanted))
        index = min(index, BINS - 1)
        before = int(below[index - 1]) if index else 0
        part = (wanted - before) / max(int(self.counts[index]), 1)
        low, high = _edge(index), _edge(index + 1)
        return low + (high - low) * min(max(part, 0.0), 1.0)


def _edge(index: int) -> float:
    """Return the lower end of a bin."""
    return 0.0 if index == 0 else float(2.0 ** (_LOWEST + (index - 1) / _PER_OCTAVE))


@dataclass
class InputStatistics:
    """The input of a linear, [..., K].

    ``channel_maximum`` float32 [K]: the largest magnitude of each channel;
    ``outliers`` int64 [K]: how often each was beyond the range that was kept
    (`clipped`); ``tokens``: how many rows were seen.
    """

    channel_maximum: Tensor
    outliers: Tensor
    magnitudes: Magnitudes = field(default_factory=Magnitudes)
    tokens: int = 0

    @staticmethod
    def of_width(width: int) -> InputStatistics:
        """Return statistics of inputs with ``width`` channels, none seen yet."""
        counts = torch.zeros(width, dtype=torch.int64)
        return InputStatistics(torch.zeros(width), counts)

    def add(self, values: Tensor) -> None:
        """Take in rows [..., K]."""
        rows = values.detach().reshape(-1, values.shape[-1])
        self.magnitudes.add(rows)
        highest = rows.abs().amax(0).float().cpu()
        self.channel_maximum = torch.maximum(self.channel_maximum, highest)
        self.tokens += rows.shape[0]

    def add_outliers(self, values: Tensor, limit: float) -> None:
        """Count by channel which of [..., K] lie beyond ``limit``."""
        rows = values.detach().reshape(-1, values.shape[-1])
        self.outliers += (rows.abs() > limit).sum(0).cpu()

    @property
    def maximum(self) -> float:
        """Return the largest magnitude."""
        return float(self.channel_maximum.max())

    def clipped(self, trim: float) -> float:
        """Return the magnitude that the share ``trim`` of the values lie beyond."""
        return min(self.magnitudes.quantile(1.0 - trim), self.maximum)

    def importance(self, trim: float) -> float:
        """Return how many times the clipped magnitude the largest one is."""
        clipped = self.clipped(trim)
        return self.maximum / clipped if clipped > 0 else 1.0
