"""What compiling one piece assumed of its sizes holds for all that share its code."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import sympy
from torch import fx

from graphopt._compat import fake_mode_of


def shape_environment(gm: fx.GraphModule) -> Any:
    """Return where the size symbols of ``gm`` and their guards live, or None."""
    return getattr(fake_mode_of(gm), "shape_env", None)


@contextmanager
def new_guards(environment: Any) -> Iterator[list[Any]]:
    """Give a list that holds, at the end, the expressions guarded in between."""
    found: list[Any] = []
    before = len(environment.guards) if environment is not None else 0
    yield found
    if environment is not None:
        found += [guard.expr for guard in environment.guards[before:]]


def guard_alike(
    environment: Any, guards: Sequence[Any], names: Mapping[str, str]
) -> None:
    """Guard what ``guards`` say of one piece's sizes for those of another.

    ``names``: the other piece's symbol for each of the first one's.
    """
    for guard in guards:
        swap = {
            symbol: _symbol(environment, names[str(symbol)])
            for symbol in guard.free_symbols
            if names.get(str(symbol), str(symbol)) != str(symbol)
        }
        if swap:
            environment.evaluate_expr(guard.xreplace(swap))


def _symbol(environment: Any, name: str) -> sympy.Symbol:
    return next(s for s in environment.var_to_range if str(s) == name)
