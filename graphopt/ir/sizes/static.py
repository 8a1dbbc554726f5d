"""Sizes over the token count for a graph that was traced with numbers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import fx

from graphopt.ir.match import shape_of, value_of
from graphopt.ir.sizes.calls import SizeConflictError
from graphopt.ir.sizes.equations import SizeEquations
from graphopt.ir.sizes.literals import (
    is_factor,
    is_inferred,
    literal_readings,
    numbers_of,
)
from graphopt.ir.sizes.rules import sliced_axis
from graphopt.ir.sizes.slots import TOKENS, LiteralReadings, Reading
from graphopt.ir.sizes.symbols import Ambiguity, TokenSymbols
from graphopt.ir.sizes.token_counts import polynomial, trial_counts
from graphopt.ir.sizes.token_inputs import TokenInputs


def solve_static(gm: fx.GraphModule, query: fx.Node) -> TokenSymbols:
    """Return the sizes of ``gm``; ``query`` [B, Hq, T, D] is its first attention's.

    Token counts on both sides of the traced one are tried first, then only lower ones:
    a table of positions may end just there.
    """
    tokens = int((shape_of(query) or ())[2])
    inputs = TokenInputs(gm, tokens)
    if inputs.anchor is None:
        reason = f"no input has an axis of {tokens} tokens"
        return TokenSymbols(None, reason=reason)
    taken = numbers_of(gm)
    solved = _StaticGraph(gm, inputs, trial_counts(tokens, taken)).solve(query)
    lower = trial_counts(tokens, taken, above=False)
    if solved.symbol is None and lower:
        again = _StaticGraph(gm, inputs, lower).solve(query)
        return solved if again.symbol is None else again
    return solved


class _StaticGraph:
    """One attempt to solve a graph, with one choice of trial token counts."""

    def __init__(
        self, gm: fx.GraphModule, inputs: TokenInputs, counts: tuple[int, ...]
    ) -> None:
        self.gm = gm
        self.inputs = inputs
        self.counts = counts
        self.equations = SizeEquations(len(counts))
        self.literals = LiteralReadings(inputs.tokens, counts, inputs.cached)

    def solve(self, query: fx.Node) -> TokenSymbols:
        """Return the solution; its symbol is None where there is none."""
        try:
            for node in self.gm.graph.nodes:
                self._visit(node)
            shapes = dict(self._shapes())
        except SizeConflictError as error:
            return TokenSymbols(None, reason=f"unsolved at {error}")
        ambiguous = tuple(self._ambiguous())
        reason = _explain(ambiguous)
        if not ambiguous and shapes[query][2] != TOKENS:
            reason = f"{query.name} has not the tokens of the inputs"
        return TokenSymbols(TOKENS, shapes, self._literals(), ambiguous, reason)

    def _visit(self, node: fx.Node) -> None:
        try:
            self._infer(node)
        except SizeConflictError:
            raise
        except Exception as error:  # an input of a kind that no fake tensor stands for
            raise SizeConflictError(node, str(error)) from error

    def _infer(self, node: fx.Node) -> None:
        value = value_of(node)
        if is_inferred(node):
            self.equations.visit(node, self._readings(node))
        elif node.op == "placeholder" and isinstance(value, torch.Tensor):
            axes = self.inputs.readings(node, self.literals)
            self.equations.choose(node, axes, value)
        elif node.op != "output":
            self.equations.know(node, self._fixed(node))

    def _readings(self, node: fx.Node) -> dict[int, tuple[Reading, ...]]:
        """Multiples of T bound no slice of an axis that has no tokens.

        A table of positions is cut at T; ``x[:, :3072]`` is a part of the channels even
        where 3072 is six times the tokens.
        """
        found = literal_readings(node, self.literals)
        for leaf, readings in found.items():
            if self._is_cut_of_channels(node, leaf):
                kept = [r for r in readings if abs(r.expr.coeff(TOKENS)) < 2]
                found[leaf] = tuple(kept)
        return {leaf: r for leaf, r in found.items() if len(r) > 1}

    def _is_cut_of_channels(self, node: fx.Node, leaf: int) -> bool:
        source = node.args[0]
        rank = len(shape_of(source) or ())
        axis = sliced_axis(node, leaf, rank)
        if axis is None or not isinstance(source, fx.Node):
            return False
        rows = self.equations.values(source).rows.values()
        sizes = {value.shape[axis] for row in rows for value in row}
        return len(sizes) == 1

    def _fixed(self, node: fx.Node) -> list[Any]:
        value = value_of(node)
        if node.op == "get_attr":
            value = self.equations.runs.attribute(self.gm, str(node.target))
        return [value] * len(self.counts)

    def _shapes(self) -> Iterator[tuple[fx.Node, tuple[Any, ...]]]:
        for node in self.gm.graph.nodes:
            traced = shape_of(node)
            if traced is None or node.op == "output":
                continue
            found = self.equations.values(node)
            if not found.unknowns:
                yield node, self._fit(node, traced, found.rows[()])

    def _fit(self, node: fx.Node, traced: Any, values: Any) -> tuple[Any, ...]:
        counts = (self.inputs.tokens, *self.counts)
        shapes = [tuple(traced), *(tuple(value.shape) for value in values)]
        sizes = [polynomial(counts, axis) for axis in zip(*shapes, strict=True)]
        if None in sizes:
            text = f"its sizes at {counts} tokens are {shapes}"
            raise SizeConflictError(node, text)
        return tuple(sizes)

    def _literals(self) -> dict[tuple[fx.Node, int], Any]:
        found = {}
        for number, unknown in enumerate(self.equations.unknowns):
            reading = self.equations.reading(number)
            if reading is not None and unknown.node.op != "placeholder":
                found[unknown.node, unknown.leaf] = reading.expr
        return {key: expr for key, expr in found.items() if expr.has(TOKENS)}

    def _ambiguous(self) -> Iterator[Ambiguity]:
        for number, unknown in enumerate(self.equations.unknowns):
            settled = self.equations.reading(number) is not None
            if not settled and not is_factor(self.equations, number):
                exprs = [reading.expr for reading in self.equations.possible(number)]
                literal = unknown.readings[0].values[0]
                yield Ambiguity(unknown.node, unknown.leaf, literal, tuple(exprs))


def _explain(ambiguous: Sequence[Ambiguity]) -> str | None:
    if not ambiguous:
        return None
    more = f"; {len(ambiguous) - 1} more like it" if len(ambiguous) > 1 else ""
    return f"{ambiguous[0]}: sizes alone do not tell{more}"
