"""Which requests come when, and how long they are."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class Arrival:
    """A request of ``prompt`` and ``new`` tokens that comes at ``time`` seconds."""

    time: float
    prompt: int
    new: int


Lengths = Callable[[random.Random], tuple[int, int]]  # draws prompt and new tokens


def poisson_arrivals(
    number: int, rate: float, lengths: Lengths, seed: int = 0
) -> list[Arrival]:
    """Return requests that come ``rate`` a second; all at once for infinity."""
    numbers = random.Random(seed)
    gaps = [numbers.expovariate(1.0) / rate for _ in range(number)]
    return [Arrival(time, *lengths(numbers)) for time in accumulate(gaps)]


def fixed_lengths(prompt: int, new: int) -> Lengths:
    """Return requests that are all alike."""
    return lambda numbers: (prompt, new)


def zipf_lengths(
    shortest: int, longest: int, theta: float, prompt_to_new: float
) -> Lengths:
    """Return requests of ``shortest`` to ``longest`` tokens, prompt and new together.

    The length of rank k has odds of ``1 / k**theta``, the shortest first, as in
    SARATHI (arXiv 2308.16369), section 5.3 (1K to 4K, theta 0.4, ratio 10).
    """
    totals = range(shortest, longest + 1)
    odds = list(accumulate((1 + rank) ** -theta for rank in range(len(totals))))

    def draw(numbers: random.Random) -> tuple[int, int]:
        (total,) = numbers.choices(totals, cum_weights=odds)
        new = max(1, round(total / (1 + prompt_to_new)))
        return total - new, new

    return draw
