"""The integers of a node's arguments, and what each may mean in tokens."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
from torch import fx

# The token count of a graph that was traced with a number in its place.
TOKENS = sympy.Symbol("T", integer=True, positive=True)


@dataclass(frozen=True)
class Reading:
    """One meaning of a literal: ``expr``, and its value at each trial token count."""

    expr: Any
    values: tuple[Any, ...]


def leaves(node: fx.Node) -> list[Any]:
    """Return the leaves of (args, kwargs) in order: nodes, numbers, dtypes, ..."""
    found: list[Any] = []
    fx.node.map_aggregate((node.args, node.kwargs), lambda leaf: _note(found, leaf))
    return found


def _note(found: list[Any], leaf: Any) -> Any:
    found.append(leaf)
    return leaf


def with_leaves(node: fx.Node, new: Sequence[Any]) -> tuple[Any, Any]:
    """Return (args, kwargs) of ``node`` with its leaves, in order, replaced."""
    rest = iter(new)
    args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), lambda _: next(rest))
    return args, kwargs


class LiteralReadings:
    """What a number may mean in a graph traced with ``tokens`` tokens.

    ``counts`` are the trial token counts; ``offsets`` the lengths that may stand beside
    the tokens, as the past of a cache does in ``T + 7``.
    """

    def __init__(
        self, tokens: int, counts: Sequence[int], offsets: Iterable[int] = ()
    ) -> None:
        self.tokens = tokens
        self.counts = tuple(counts)
        self._offsets = {1, -1, *offsets} - {0}
        self._known: dict[Any, tuple[Reading, ...]] = {}

    def of(self, literal: Any) -> tuple[Reading, ...]:
        """Return the readings of ``literal``, the number itself first.

        Anything but a number has the one reading that it is what it is.
        """
        if isinstance(literal, bool) or not isinstance(literal, (int, float)):
            return ()
        key = (type(literal), literal)
        if key not in self._known:
            self._known[key] = tuple(self._readings(literal))
        return self._known[key]

    def _readings(self, literal: int | float) -> list[Reading]:
        constant = Reading(sympy.sympify(literal), (literal,) * len(self.counts))
        if self.tokens == 1:  # every number is a multiple of that
            forms = [(1, 0)] if literal == 1 and isinstance(literal, int) else []
        elif isinstance(literal, float):
            forms = [(1, 0)] if literal == self.tokens else []
        else:
            forms = self._forms(abs(literal))
        sign = -1 if literal < 0 else 1
        kind = type(literal)
        return [constant] + [
            Reading(
                sign * (factor * TOKENS + offset),
                tuple(kind(sign * (factor * c + offset)) for c in self.counts),
            )
            for factor, offset in forms
        ]

    def _forms(self, size: int) -> list[tuple[int, int]]:
        """Return (a, b) of the readings a T + b; 0 and 1 are always themselves."""
        if size < 2:
            return []
        factor, rest = divmod(size, self.tokens)
        forms = [(factor, 0)] if factor and not rest else []
        if size - self.tokens in self._offsets:
            forms.append((1, size - self.tokens))
        return forms
