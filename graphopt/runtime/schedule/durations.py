"""Measured seconds of op groups, by the number of tokens before the chunk."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence


class Durations:
    """The best that was seen of each op group, for each past.

    Between two pasts seconds go along a line: attention reads as many more keys. Beyond
    them nothing is guessed.
    """

    def __init__(self) -> None:
        self._best: dict[int, list[float]] = {}

    def note(self, pasts: Sequence[int], seconds: Sequence[Sequence[float]]) -> None:
        """Keep ``seconds`` of the groups of each chunk, one row for each past."""
        for past, row in zip(pasts, seconds, strict=True):
            before = self._best.get(past, row)
            self._best[past] = [min(pair) for pair in zip(before, row, strict=True)]

    def covers(self, pasts: Sequence[int]) -> bool:
        """Tell whether all of ``pasts`` lie between measured ones."""
        if not self._best:
            return False
        return min(self._best) <= min(pasts) and max(pasts) <= max(self._best)

    def of(self, past: int, position: int) -> float:
        """Return the seconds of the group at ``position`` behind ``past`` tokens."""
        if past in self._best:
            return self._best[past][position]
        pasts = sorted(self._best)
        place = bisect_left(pasts, past)
        low, high = pasts[place - 1], pasts[place]
        share = (past - low) / (high - low)
        first, second = self._best[low][position], self._best[high][position]
        return first + share * (second - first)

    def total(self, pasts: Sequence[int]) -> float:
        """Return the seconds of all groups of all chunks, one after the other."""
        groups = len(next(iter(self._best.values())))
        return sum(self.of(past, i) for past in pasts for i in range(groups))
