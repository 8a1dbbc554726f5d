"""Few cases in which any two values of any two factors meet."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Any


def pairwise(factors: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """Yield few choices in which any two values of any two factors meet."""
    generator = random.Random(0)
    missing = {
        ((a, x), (b, y))
        for (a, xs), (b, ys) in itertools.combinations(sorted(factors.items()), 2)
        for x, y in itertools.product(xs, ys)
    }
    while missing:
        # Sorted, since every test process has to come to the same cases.
        pair = generator.choice(sorted(missing, key=repr))
        tries = (
            {n: generator.choice(v) for n, v in factors.items()} | dict(pair)
            for _ in range(30)
        )
        best = max(tries, key=lambda chosen: len(missing & _pairs(chosen)))
        missing -= _pairs(best)
        yield best


def on_two(things: Sequence[Any], targets: Sequence[Any]) -> list[tuple[Any, Any]]:
    """Return each thing with two targets, so that each target gets half of all."""
    count = len(targets)
    return [
        (thing, targets[(place + step) % count])
        for place, thing in enumerate(things)
        for step in (0, 1)
    ]


def name_of(given: Any) -> str:
    """Return what a parameter is called in the name of a test."""
    return str(getattr(given, "name", given))


def _pairs(chosen: Mapping[str, Any]) -> set[tuple[Any, ...]]:
    return set(itertools.combinations(sorted(chosen.items()), 2))
