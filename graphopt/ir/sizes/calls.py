"""One node, inferred for one combination of readings after another."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch import fx

from graphopt.ir.sizes.readings import Row
from graphopt.ir.sizes.rules import aligned, is_reshape
from graphopt.ir.sizes.slots import leaves, with_leaves

if TYPE_CHECKING:
    from graphopt.ir.sizes.equations import SizeEquations


_Working = tuple[int, Row, tuple[Any, ...]]  # how well it keeps tokens, and the values


class SizeConflictError(Exception):
    """No reading of the literals lets ``node`` run at another token count."""

    def __init__(self, node: fx.Node, reason: str) -> None:
        super().__init__(f"{node.name}: {reason}")
        self.node = node
        self.reason = reason


class Call:
    """One node with its leaves, evaluated for one combination after another."""

    def __init__(self, equations: SizeEquations, node: fx.Node, own: dict[int, int]):
        self.equations = equations
        self.node = node
        self.own = own
        self.leaves = leaves(node)
        self.error: Exception | None = None

    def rows(self, members: Row, possible: list[Row]) -> dict[Row, tuple[Any, ...]]:
        """Return the values at the trial counts for the combinations that work.

        A reshape that keeps tokens whole rules out one that would scramble them, and
        of those one that keeps their axis rules out one that merges it with others;
        but not one of another input: what came before may have misread that.
        """
        inputs = len(members) - len(self.own)
        found: dict[Row, list[_Working]] = {}
        for row in possible:
            chosen = dict(zip(members, row, strict=True))
            sources = {n: self._row(n, chosen) for n in self.node.all_input_nodes}
            result = self._results(sources, chosen)
            if result is not None:
                rank = self._rank(sources, result)
                found.setdefault(row[:inputs], []).append((rank, row, result))
        if not found:
            raise SizeConflictError(self.node, _first_line(self.error))
        return dict(pair for alike in found.values() for pair in _best(alike))

    def _rank(self, sources: dict[fx.Node, Any], result: Any) -> int:
        if not self._keeps_tokens(sources, result):
            return 0
        return 2 if self._keeps_axes(sources, result) else 1

    def _results(self, sources: dict[fx.Node, Any], chosen: dict[int, int]) -> Any:
        """Return the value at each trial count, or None where one is refused."""
        if any(row is None for row in sources.values()):
            return None
        points = range(self.equations.points)
        try:
            return tuple(self._at(point, sources, chosen) for point in points)
        except Exception as error:  # operators refuse in as many ways as there are
            self.error = error
            return None

    def _keeps_tokens(self, sources: dict[fx.Node, Any], result: Any) -> bool:
        if not is_reshape(self.node):
            return True
        before = sources[self.leaves[0]]
        return all(
            aligned(b.shape, a.shape) for b, a in zip(before, result, strict=True)
        )

    def _keeps_axes(self, sources: dict[fx.Node, Any], result: Any) -> bool:
        """Tell whether each axis that varies with the token count is still there."""
        if not is_reshape(self.node):
            return True
        before, after = (
            set(zip(*(x.shape for x in values), strict=True))
            for values in (sources[self.leaves[0]], result)
        )
        return {sizes for sizes in before if len(set(sizes)) > 1} <= after

    def _row(self, source: fx.Node, chosen: dict[int, int]) -> Any:
        values = self.equations.values(source)
        return values.rows.get(tuple(chosen[u] for u in values.unknowns))

    def _at(self, point: int, sources: dict[fx.Node, Any], chosen: Any) -> Any:
        new = [
            s if not isinstance(s, fx.Node) else sources[s][point] for s in self.leaves
        ]
        for leaf, unknown in self.own.items():
            readings = self.equations.unknowns[unknown].readings
            new[leaf] = readings[chosen[unknown]].values[point]
        args, kwargs = with_leaves(self.node, new)
        return self.equations.runs.call(self.node, args, kwargs)


def _best(working: list[_Working]) -> Iterator[tuple[Row, tuple[Any, ...]]]:
    most = max(rank for rank, _, _ in working)
    return ((row, result) for rank, row, result in working if rank == most)


def _first_line(error: Exception | None) -> str:
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0]
