"""The token symbol of a graph: sizes as expressions in the number of tokens.

A graph traced with dynamic shapes has them. In a graph traced with numbers they are
found by solving its size equations, which infers every node again at other token
counts. A literal that has two readings even so is reported, and never guessed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import SymInt, fx

from graphopt.ir.match import op_name, shape_of, size_expr, sizes_of, value_of
from graphopt.ir.sizes.slots import leaves, with_leaves


@dataclass(frozen=True)
class Ambiguity:
    """A literal of ``node`` with several readings that satisfy every equation.

    ``leaf`` is its place among the arguments' leaves; for an input, its axis.
    """

    node: fx.Node
    leaf: int
    literal: int | float
    readings: tuple[Any, ...]

    def __str__(self) -> str:
        either = " or ".join(str(r) for r in self.readings)
        return f"{self.literal} in {self.node.name} ({op_name(self.node)}) is {either}"


@dataclass(frozen=True)
class TokenSymbols:
    """Sizes over the token count ``symbol``; ``reason`` says why some are not known.

    ``shapes`` holds the sizes of each tensor node as sympy expressions, ``literals``
    the arguments that mean tokens, by node and leaf (as `size_slots.leaves` counts
    them). With a ``reason`` both hold what is certain all the same, maybe nothing.
    """

    symbol: Any
    shapes: Mapping[fx.Node, tuple[Any, ...]] = field(default_factory=dict)
    literals: Mapping[tuple[fx.Node, int], Any] = field(default_factory=dict)
    ambiguous: tuple[Ambiguity, ...] = ()
    reason: str | None = None

    def arguments(self, node: fx.Node) -> tuple[Any, Any]:
        """Return (args, kwargs) of ``node`` with sizes as sympy expressions."""
        found = [
            self.literals.get((node, place), _expression(leaf))
            for place, leaf in enumerate(leaves(node))
        ]
        return with_leaves(node, found)


def _expression(leaf: Any) -> Any:
    expr = size_expr(leaf) if isinstance(leaf, fx.Node) else None
    return leaf if expr is None else expr


def find_symbols(gm: fx.GraphModule, query: fx.Node | None) -> TokenSymbols:
    """Return the sizes of ``gm`` over its token count.

    ``query`` [B, Hq, T, D] is that of the first attention, None where there is none.
    """
    from graphopt.ir.sizes.static import solve_static

    if query is None:
        return TokenSymbols(None, reason="no attention names the tokens")
    tokens = (shape_of(query) or ())[2]
    if isinstance(tokens, SymInt):
        shapes = {n: sizes_of(n) for n in gm.graph.nodes if shape_of(n) is not None}
        return TokenSymbols(size_expr(tokens), shapes)
    if tokens == 1:
        return TokenSymbols(None, reason="one token: its size is that of any axis of 1")
    if any(isinstance(value_of(n), SymInt) for n in gm.graph.nodes):
        return TokenSymbols(None, reason="sizes other than the tokens are symbolic")
    return solve_static(gm, query)
