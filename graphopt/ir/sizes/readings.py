"""Unknowns with a few possible readings each, and the equations between them.

A literal 20 in a graph traced with 20 tokens may be the number 20 or the token count T.
Each such literal is an unknown; each operator that does not work for every combination
of readings of its unknowns is an equation, kept as the table of combinations that work.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence

Row = tuple[int, ...]

# Combinations that one operator may have; real graphs stay far below.
_LIMIT = 256


class NoReadingError(Exception):
    """The equations leave an unknown without a reading, or there are too many."""


class Readings:
    """Domains of the unknowns 0, 1, ...: which of their readings are still possible.

    After each `require` every reading left has a partner in every equation (arc
    consistency), so that a reading is only ever dropped because it cannot hold.
    """

    def __init__(self) -> None:
        self._domains: list[frozenset[int]] = []
        self._tables: list[tuple[Row, frozenset[Row]]] = []
        self._of: list[list[int]] = []

    def add(self, count: int) -> int:
        """Return a new unknown with the readings 0 to ``count - 1``."""
        self._domains.append(frozenset(range(count)))
        self._of.append([])
        return len(self._domains) - 1

    def domain(self, unknown: int) -> list[int]:
        """Return the readings still possible, in order."""
        return sorted(self._domains[unknown])

    def only(self, unknown: int) -> int | None:
        """Return the reading of an unknown that is settled, else None."""
        domain = self._domains[unknown]
        return next(iter(domain)) if len(domain) == 1 else None

    def combinations(self, unknowns: Sequence[int]) -> list[Row]:
        """Return the rows over ``unknowns`` that the equations so far admit.

        Raises NoReadingError when there are more than an operator may have.
        """
        rows: list[Row] = [()]
        for place, unknown in enumerate(unknowns):
            rows = [(*row, r) for row in rows for r in self.domain(unknown)]
            for positions, allowed in self._checks(unknowns[: place + 1]):
                rows = [r for r in rows if tuple(r[p] for p in positions) in allowed]
            if len(rows) > _LIMIT:
                raise NoReadingError("too many literals whose meaning is open")
        return rows

    def _checks(self, unknowns: Sequence[int]) -> Iterator[tuple[Row, set[Row]]]:
        """Yield the equations of the last unknown, projected on ``unknowns``."""
        place = {unknown: i for i, unknown in enumerate(unknowns)}
        for number in self._of[unknowns[-1]]:
            members, rows = self._tables[number]
            shared = [i for i, member in enumerate(members) if member in place]
            allowed = {tuple(row[i] for i in shared) for row in rows}
            yield tuple(place[members[i]] for i in shared), allowed

    def require(self, unknowns: Sequence[int], rows: Iterable[Row]) -> None:
        """Add the equation that ``unknowns`` together take one of ``rows``.

        Raises NoReadingError when nothing is left for some unknown.
        """
        for unknown in unknowns:
            self._of[unknown].append(len(self._tables))
        self._tables.append((tuple(unknowns), frozenset(rows)))
        self._narrow([len(self._tables) - 1])

    def _narrow(self, pending: list[int]) -> None:
        while pending:
            number = pending.pop()
            members, rows = self._tables[number]
            kept = frozenset(
                row
                for row in rows
                if all(r in self._domains[m] for m, r in zip(members, row, strict=True))
            )
            if not kept:
                raise NoReadingError("no reading of the literals fits")
            self._tables[number] = (members, kept)
            for place, member in enumerate(members):
                self._restrict(member, frozenset(row[place] for row in kept), pending)

    def _restrict(
        self, unknown: int, allowed: frozenset[int], pending: list[int]
    ) -> None:
        narrowed = self._domains[unknown] & allowed
        if narrowed != self._domains[unknown]:
            self._domains[unknown] = narrowed
            pending += [n for n in self._of[unknown] if n not in pending]
