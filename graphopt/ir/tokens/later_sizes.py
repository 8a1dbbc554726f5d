"""Decide, for each size in the nodes after a gather, whether it means T or T'."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import sympy
import torch
from torch import SymInt, fx

from graphopt import _compat
from graphopt.errors import PassError
from graphopt.ir.match import op_name, shape_of, size_expr, value_of
from graphopt.ir.sizes.equations import SizeEquations
from graphopt.ir.sizes.literals import is_factor, is_inferred, literal_readings
from graphopt.ir.sizes.slots import LiteralReadings, Reading, leaves
from graphopt.ir.sizes.token_counts import trial_counts
from graphopt.ir.sizes.token_inputs import TokenInputs
from graphopt.ir.tokens.kept import KeptTokens, depends_on_data
from graphopt.ir.tokens.tokenwise import TokenwiseMode


class LaterSizes:
    """The size equations of ``later`` nodes at trial counts of T', with T as traced.

    Everything else in the graph keeps its sizes, so that a size which means the keys of
    an earlier layer has no other reading that fits. Nodes of ``alike`` have the sizes
    of the first gathered tensor: a layer gives what it got, and nothing broadcasts.
    With ``tokenwise`` an operator that looks from one token at another cannot run.
    """

    def __init__(
        self,
        kept: KeptTokens,
        later: Sequence[fx.Node],
        alike: Collection[fx.Node],
        tokenwise: bool = False,
    ) -> None:
        self.kept = kept
        self.alike = alike
        self.later = later
        self.moved = {*later, *kept.shapes}
        self.inside = set(self.moved)
        self.gm = kept.model.gm
        self.counts = trial_counts(kept.traced, self._taken())
        watch = TokenwiseMode(self.counts) if tokenwise else None
        self.equations = SizeEquations(len(self.counts), watch)
        solved = kept.is_static and kept.traced > 1
        offsets = TokenInputs(self.gm, kept.traced).cached if solved else []
        self.literals = LiteralReadings(kept.traced, self.counts, offsets)

    def _taken(self) -> set[int]:
        found = {self.kept.traced, *self.kept.hints.values()}
        exprs: set[Any] = set()
        for node in self.later:
            exprs.update(size_expr(size) for size in shape_of(node) or ())
            found.update(abs(leaf) for leaf in leaves(node) if type(leaf) is int)
        known = (expr for expr in exprs if not depends_on_data(expr))
        return found | {self.kept.number(expr) for expr in known}

    def solve(self) -> dict[tuple[fx.Node, int], Any]:
        """Return the arguments to change: by node and leaf, an expression over T'.

        Raises SizeConflictError where a node cannot run on T' tokens, and PassError
        where both readings of a size fit.
        """
        known = []
        for node, sizes in self.kept.shapes.items():
            shapes = [
                tuple(self.kept.at(s, count) for s in sizes) for count in self.counts
            ]
            like = value_of(node)
            tensors = [self.equations.runs.tensor(like, s) for s in shapes]
            self.equations.know(node, tensors)
            known.append(shapes)
        for node in self.later:
            for source in node.all_input_nodes:
                self._know_outside(source)
            if is_inferred(node):
                self.equations.visit(node, self._readings(node))
                if node in self.alike:
                    self.equations.require(node, known[0])
            else:
                self.equations.know(node, [None] * len(self.counts))
        return dict(self._changes())

    def _know_outside(self, node: fx.Node) -> None:
        if node not in self.inside:
            self.inside.add(node)
            value = value_of(node)
            if node.op == "get_attr":
                found = self.equations.runs.attribute(self.gm, str(node.target))
            else:
                plain = tuple(value) if isinstance(value, tuple) else value
                found = fx.node.map_aggregate(plain, self._traced)
            self.equations.know(node, [found] * len(self.counts))

    def _traced(self, value: Any) -> Any:
        """Return a value as it was when traced: numbers for symbols."""
        if isinstance(value, torch.Tensor):
            sizes = tuple(self.kept.number(s) for s in value.shape)
            strides = tuple(self.kept.number(s) for s in value.stride())
            return self.equations.runs.tensor(value, sizes, strides)
        hint = _compat.size_hint(value)
        return 1.0 if isinstance(value, torch.SymFloat) and hint is None else hint

    def _readings(self, node: fx.Node) -> dict[int, tuple[Reading, ...]]:
        if self.kept.is_static:
            found = literal_readings(node, self.literals)
            narrowed = {leaf: self._known(node, leaf, r) for leaf, r in found.items()}
        else:
            narrowed = {i: self._symbolic(s) for i, s in enumerate(leaves(node))}
        return {leaf: r for leaf, r in narrowed.items() if len(r) > 1}

    def _known(
        self, node: fx.Node, leaf: int, readings: tuple[Reading, ...]
    ) -> tuple[Reading, ...]:
        """Keep the readings that the analysis of the whole graph left."""
        symbols = self.kept.model.symbols
        open_ones = {(a.node, a.leaf): a.readings for a in symbols.ambiguous}
        if symbols.symbol is None or node not in symbols.shapes:
            return readings
        left = open_ones.get((node, leaf), (symbols.literals.get((node, leaf)),))
        return (readings[0], *(r for r in readings[1:] if r.expr in left))

    def _symbolic(self, leaf: Any) -> tuple[Reading, ...]:
        """A size from outside the later nodes stays as it is, or has T' for T."""
        value = value_of(leaf) if isinstance(leaf, fx.Node) else None
        if not isinstance(value, SymInt) or leaf in self.moved:
            return ()
        expr = value.node.expr
        if not expr.has(self.kept.symbol):
            return ()
        same = (self.kept.number(expr),) * len(self.counts)
        fewer = tuple(self.kept.at(expr, count) for count in self.counts)
        return (Reading(sympy.Integer(same[0]), same), Reading(expr, fewer))

    def _changes(self) -> Any:
        for number, unknown in enumerate(self.equations.unknowns):
            reading = self.equations.reading(number)
            if reading is None and not self._is_number(number):
                raise PassError(self._open(number))
            if reading is not None and reading is not unknown.readings[0]:
                yield (unknown.node, unknown.leaf), reading.expr

    def _is_number(self, number: int) -> bool:
        """Tell whether an open literal stays as it is.

        With one token traced that is any 1 that no size depends on.
        """
        one = self.kept.traced == 1 and self.equations.is_inert(number)
        return one or is_factor(self.equations, number)

    def _open(self, number: int) -> str:
        unknown = self.equations.unknowns[number]
        leaf = leaves(unknown.node)[unknown.leaf]
        return (
            f"{unknown.node.name} ({op_name(unknown.node)}): sizes do not tell whether "
            f"{leaf} means the {self.kept.traced} tokens before or those kept"
        )
