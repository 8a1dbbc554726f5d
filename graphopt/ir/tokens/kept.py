"""What tensors say about the tokens that a pass kept of them: T' and where it shows."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import sympy
import torch
from torch import SymInt, fx

from graphopt import _compat
from graphopt.errors import PassError
from graphopt.ir.match import size_expr, sizes_of, value_of
from graphopt.ir.model_graph import ModelGraph
from graphopt.ir.sizes.slots import TOKENS

SizesOf = Callable[[fx.Node], tuple[Any, ...]]


class KeptTokens:
    """The token count T of ``model`` and the count T' that ``gathered`` tensors have.

    ``symbol`` stands for T in sizes; ``source`` and ``axis`` show T', whose value is
    ``size``. ``shapes`` holds the sizes of the gathered tensors with ``symbol`` for T'.
    Raises PassError where a gathered tensor is not the old one with T' for T.
    """

    def __init__(self, model: ModelGraph, gathered: Mapping[fx.Node, fx.Node]) -> None:
        self.model = model
        self.is_static = not isinstance(model.tokens, SymInt)
        self.symbol: Any = TOKENS if self.is_static else size_expr(model.tokens)
        if model.tokens is None or not isinstance(self.symbol, sympy.Symbol):
            raise PassError(f"the tokens ({model.tokens}) are no count of an axis")
        self.traced: int = _compat.size_hint(model.tokens)
        self.hints = _hints(model.gm)
        self.source, self.axis = self._shown(gathered)
        self.size = value_of(self.source).shape[self.axis]
        self.shapes = {new: self._shape(old, new) for old, new in gathered.items()}

    def sizes(self, node: fx.Node) -> tuple[Any, ...]:
        """Return the sizes of a tensor over T; unknown ones of a static graph by value.

        What has as many elements as there are tokens is taken for them only here, where
        a pass has said that it gathered the tensor by tokens.
        """
        known = token_sizes(self.model)[1](node)
        if known or not self.is_static:
            return known
        return tuple(TOKENS if s == self.traced else s for s in sizes_of(node))

    def _shown(self, gathered: Mapping[fx.Node, fx.Node]) -> tuple[fx.Node, int]:
        for old, new in gathered.items():
            pairs = zip(self.sizes(old), sizes_of(old), sizes_of(new), strict=True)
            for axis, (expr, before, after) in enumerate(pairs):
                if expr == self.symbol and before != after:
                    return new, axis
        raise PassError("no gathered tensor has fewer tokens than before")

    def _shape(self, old: fx.Node, new: fx.Node) -> tuple[Any, ...]:
        kept = size_expr(self.size)
        result = []
        for expr, before, after in zip(
            self.sizes(old), sizes_of(old), sizes_of(new), strict=True
        ):
            follows = sympy.expand(expr.subs(self.symbol, kept) - after) == 0
            if not follows and before != after and before != 1:
                text = f"{new.name} has {after} where {old.name} has {expr}"
                raise PassError(f"{text}, so {kept} tokens kept do not explain it")
            changed = expr.has(self.symbol) and follows
            result.append(expr if changed else self.number(after))
        return tuple(result)

    def number(self, size: Any) -> int:
        """Return a size (int, SymInt or expression) as traced, T at its old value."""
        if isinstance(size, int):
            return size
        expr = size if isinstance(size, sympy.Basic) else size_expr(size)
        value = sympy.sympify(expr).subs(self.hints)
        if not value.is_Integer:
            raise PassError(f"the size {size} depends on data")
        return int(value)

    def at(self, expr: Any, count: int) -> int:
        """Return an expression over T as a number, with ``count`` tokens."""
        return self.number(sympy.sympify(expr).subs(self.symbol, count))


def depends_on_data(expr: Any) -> bool:
    """Tell whether a size is known only when an operator before it has run."""
    symbols = getattr(expr, "free_symbols", ())
    return any(_compat.is_data_symbol(symbol) for symbol in symbols)


def token_sizes(model: ModelGraph) -> tuple[Any, SizesOf]:
    """Return the symbol of T, and a function from a tensor to its sizes over T.

    In a static graph () is for tensors whose sizes could not be told.
    """
    if isinstance(model.tokens, SymInt):
        return size_expr(model.tokens), sizes_of
    return TOKENS, lambda node: tuple(model.symbols.shapes.get(node) or ())


def _hints(gm: fx.GraphModule) -> dict[Any, int]:
    """Return the traced value of every symbol that the inputs of ``gm`` show."""
    found: dict[Any, int] = {}
    for node in gm.graph.find_nodes(op="placeholder"):
        value = value_of(node)
        sizes = value.shape if isinstance(value, torch.Tensor) else [value]
        for size in sizes:
            if isinstance(size, SymInt):
                found[size.node.expr] = _compat.size_hint(size)
    return {expr: hint for expr, hint in found.items() if expr.is_Symbol}
