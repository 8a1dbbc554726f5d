"""Lengths of prompts as they come: many short ones and a few long ones."""

from __future__ import annotations

import math
import random


def log_uniform(count: int, shortest: int, longest: int, seed: int) -> list[int]:
    """Return ``count`` lengths whose logarithms are spread evenly at random.

    The first is ``longest``, so that every draw is padded alike.
    """
    draw = random.Random(seed)
    low, high = math.log(shortest), math.log(longest)
    drawn = [round(math.exp(draw.uniform(low, high))) for _ in range(count - 1)]
    return [longest, *drawn]
