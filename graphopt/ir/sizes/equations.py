"""Solve the size equations of a graph: which literals mean the token count.

Every operator is inferred on fake tensors at several token counts, once for each
combination of readings of the literals it depends on. Combinations that it refuses at
some count drop out, which is what its size equation says: the elements of a view must
stay the same in number, broadcast sizes must be equal, inner sizes of a product too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt.ir.sizes.calls import Call, SizeConflictError
from graphopt.ir.sizes.fake_runs import FakeRuns
from graphopt.ir.sizes.readings import NoReadingError, Readings, Row
from graphopt.ir.sizes.slots import Reading


@dataclass(frozen=True)
class Unknown:
    """A literal of ``node`` (its leaf ``leaf``; an axis, for an input)."""

    node: fx.Node
    leaf: int
    readings: tuple[Reading, ...]


@dataclass(frozen=True)
class Values:
    """What a node gives at each trial count, for each reading of ``unknowns``."""

    unknowns: Row
    rows: dict[Row, tuple[Any, ...]]


class SizeEquations:
    """The values of the nodes visited so far, and the unknowns between them.

    ``points`` is the number of trial token counts. Nodes are visited in graph order.
    What ``watch`` raises at an operator counts as its refusal.
    """

    def __init__(
        self, points: int, watch: AbstractContextManager[Any] | None = None
    ) -> None:
        self.points = points
        self.runs = FakeRuns(watch)
        self.unknowns: list[Unknown] = []
        self._solver = Readings()
        self._values: dict[fx.Node, Values] = {}
        self._inert: set[int] = set()

    def know(self, node: fx.Node, values: Sequence[Any]) -> None:
        """Give the value of ``node`` at each trial count."""
        self._values[node] = Values((), {(): tuple(values)})

    def choose(
        self, node: fx.Node, axes: Sequence[tuple[Reading, ...]], like: torch.Tensor
    ) -> None:
        """Give an input tensor; some of its ``axes`` may have several readings."""
        own = {
            axis: self._unknown(node, axis, readings)
            for axis, readings in enumerate(axes)
            if len(readings) > 1
        }
        members = tuple(own.values())
        rows = {}
        for row in self._combinations(node, members):
            picks = dict(zip(own, row, strict=True))
            sizes = [r[picks.get(axis, 0)].values for axis, r in enumerate(axes)]
            rows[row] = tuple(
                self._input(like, tuple(int(s[point]) for s in sizes))
                for point in range(self.points)
            )
        self._values[node] = Values(members, rows)

    def _input(self, like: torch.Tensor, sizes: tuple[int, ...]) -> torch.Tensor:
        same = tuple(like.shape) == sizes
        return self.runs.tensor(like, sizes, like.stride() if same else None)

    def _unknown(self, node: fx.Node, leaf: int, readings: tuple[Reading, ...]) -> int:
        self.unknowns.append(Unknown(node, leaf, readings))
        return self._solver.add(len(readings))

    def _combinations(self, node: fx.Node, unknowns: Sequence[int]) -> list[Row]:
        try:
            return self._solver.combinations(unknowns)
        except NoReadingError as error:
            raise SizeConflictError(node, str(error)) from None

    def values(self, node: fx.Node) -> Values:
        """Return what ``node`` gives, over the unknowns that are still open."""
        found = self._values[node]
        settled = [u for u in found.unknowns if self._solver.only(u) is not None]
        if settled:
            found = self._values[node] = self._without(found, set(settled))
        return found

    def _without(self, values: Values, settled: set[int]) -> Values:
        members = values.unknowns
        kept = [place for place, u in enumerate(members) if u not in settled]
        rows = {
            tuple(row[place] for place in kept): result
            for row, result in values.rows.items()
            if all(
                u not in settled or r == self._solver.only(u)
                for u, r in zip(members, row, strict=True)
            )
        }
        return Values(tuple(members[place] for place in kept), rows)

    def visit(self, node: fx.Node, literals: Mapping[int, tuple[Reading, ...]]) -> None:
        """Infer ``node``; ``literals`` are its leaves with more than one reading.

        Raises SizeConflictError where no combination works.
        """
        own = {leaf: self._unknown(node, leaf, r) for leaf, r in literals.items()}
        inputs = [self.values(source) for source in node.all_input_nodes]
        members = tuple(dict.fromkeys(u for v in inputs for u in v.unknowns))
        members += tuple(own.values())
        call = Call(self, node, own)
        possible = self._combinations(node, members)
        rows = call.rows(members, possible)
        if len(rows) < len(possible):
            self._require(node, members, rows)
        self._values[node] = self._project(Values(members, rows), own.values())

    def require(self, node: fx.Node, shapes: Sequence[tuple[int, ...]]) -> None:
        """Rule out what gives ``node`` other sizes than ``shapes``, one a trial count.

        Raises SizeConflictError where nothing is left.
        """
        values = self.values(node)
        rows = {
            row: result
            for row, result in values.rows.items()
            if all(tuple(r.shape) == s for r, s in zip(result, shapes, strict=True))
        }
        if not rows:
            raise SizeConflictError(node, f"it cannot have the sizes {shapes[0]}")
        if len(rows) < len(values.rows):
            self._require(node, values.unknowns, rows)
            self._values[node] = Values(values.unknowns, rows)

    def _require(self, node: fx.Node, members: Row, rows: Any) -> None:
        try:
            self._solver.require(members, rows)
        except NoReadingError as error:
            raise SizeConflictError(node, str(error)) from None

    def _project(self, values: Values, own: Any) -> Values:
        """Drop the unknowns that do not show in the result."""
        for unknown in values.unknowns:
            place = values.unknowns.index(unknown)
            rows: dict[Row, tuple[Any, ...]] = {}
            for row, result in values.rows.items():
                rest = (*row[:place], *row[place + 1 :])
                if not _same(rows.setdefault(rest, result), result):
                    break
            else:
                members = values.unknowns
                values = Values((*members[:place], *members[place + 1 :]), rows)
                self._inert |= {unknown} & set(own)
        return values

    def reading(self, number: int) -> Reading | None:
        """Return what unknown ``number`` means, or None while it is open."""
        settled = self._solver.only(number)
        return None if settled is None else self.unknowns[number].readings[settled]

    def possible(self, number: int) -> list[Reading]:
        """Return the readings of unknown ``number`` that no equation rules out."""
        readings = self.unknowns[number].readings
        return [readings[r] for r in self._solver.domain(number)]

    def is_inert(self, number: int) -> bool:
        """Tell whether unknown ``number`` is a value: no size depends on it."""
        return number in self._inert


def _same(left: Any, right: Any) -> bool:
    """Tensors are shared by form, so that identity compares them."""
    if isinstance(left, tuple) and isinstance(right, tuple):
        return len(left) == len(right) and all(map(_same, left, right))
    if isinstance(left, (int, float, str, bool)):
        return type(left) is type(right) and left == right
    return left is right
