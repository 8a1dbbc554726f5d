"""The size symbols of pieces: which a piece needs, and pieces alike but for names."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import sympy
import torch
from torch import fx

_SYMBOL = re.compile(r"\b[suz]f?\d+\b")  # as torch names them: s27, u0, zf3


def symbols_of(value: Any) -> list[sympy.Symbol]:
    """Return the size symbols in a fake value (a tensor, a size, or several), in order.

    By place, not by name: names differ between pieces that are alike.
    """
    sizes = (size.node.expr for size in _sizes(value))
    found = (s for expr in sizes for s in sorted(expr.free_symbols, key=str))
    return list(dict.fromkeys(found))


def fixed_size(node: fx.Node) -> int | None:
    """Return the number that ``node`` always gives, or None.

    A piece has it as a literal: AOTAutograd takes a number that is given for a size
    which may change, and guards on a name that nobody knows.
    """
    value = node.meta.get("example_value")
    if isinstance(value, torch.SymInt) and value.node.expr.is_number:
        return int(value.node.expr)
    is_number = isinstance(value, int) and not isinstance(value, bool)
    return value if is_number else None


def _sizes(value: Any) -> Iterator[torch.SymInt]:
    if isinstance(value, torch.SymInt):
        yield value
    elif isinstance(value, torch.Tensor):
        strided = value.layout == torch.strided
        offsets = (*value.stride(), value.storage_offset()) if strided else ()
        yield from (s for s in (*value.shape, *offsets) if isinstance(s, torch.SymInt))
    elif isinstance(value, (tuple, list)):
        for one in value:
            yield from _sizes(one)


def needed(
    inputs: Sequence[fx.Node], nodes: Sequence[fx.Node], given: Sequence[fx.Node]
) -> list[fx.Node]:
    """Return those of the size inputs ``given`` whose symbols occur in the piece.

    Ordered by their first occurrence, so that pieces alike get them in the same places.
    Inductor must be able to bind every symbol that it meets, and a size such as
    ``s0 + s1`` cannot be solved from one tensor's shape.
    """
    holders = {node.meta["example_value"].node.expr: node for node in given}
    found: dict[fx.Node, None] = {}
    # A size that is an expression may bind several symbols: always passed along, with
    # them, for Inductor's cache writes guards over what a piece is given.
    composed = [n for n in given if _is_expression(n)]
    for node in (*composed, *inputs, *nodes):
        for symbol in symbols_of(node.meta.get("example_value")):
            if symbol in holders:
                found[holders[symbol]] = None
    return [*composed, *found]


def _is_expression(size: fx.Node) -> bool:
    expr = size.meta["example_value"].node.expr
    return bool(expr.free_symbols) and not expr.is_Symbol


def canonical(text: str) -> tuple[str, tuple[str, ...]]:
    """Return ``text`` with its size symbols numbered, and their names in that order.

    Equal texts of two pieces mean that they differ by the names of symbols at most.
    """
    order: dict[str, int] = {}

    def number(match: re.Match[str]) -> str:
        return f"size{order.setdefault(match.group(), len(order))}"

    return _SYMBOL.sub(number, text), tuple(order)


def described(nodes: Sequence[fx.Node]) -> list[tuple[str, str, str]]:
    """Return symbol, value at hand and range of the plain size inputs ``nodes``.

    The code for one piece assumes what was found true of its sizes at hand.
    """
    result = []
    for node in nodes:
        size = node.meta["example_value"].node
        bounds = size.shape_env.var_to_range.get(size.expr, "")
        result.append((str(size.expr), str(size.hint), str(bounds)))
    return result
