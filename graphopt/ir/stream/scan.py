"""Find the residual adds of a graph and follow the stream from one to the next.

A residual add joins the stream with a branch that was computed from the stream. It is
found by that loop alone: one operand leads back along the trunk (`trunk`) to the value
that the stream had, and the other depends on a node of that way. Which operators the
branch holds does not matter, so experts, extra norms and scaled branches are no cases.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import fx

from graphopt.ir.match import op_name, shape_of
from graphopt.ir.stream.trunk import Trunk, is_floating, width

_ADDS = ("add", "iadd", "add_")


@dataclass(frozen=True)
class ResidualAdd:
    """``node`` = ``stream`` + ``branch``, [B, S, H] each, or [B*S, H].

    ``stream`` is the operand as it was when the branch read it; ``attention`` are the
    indices of the attention sites inside the branch.
    """

    node: fx.Node
    stream: fx.Node
    branch: fx.Node
    attention: tuple[int, ...]


@dataclass
class Group:
    """Adds whose branches all read one value: one, or several side by side.

    ``path`` is the trunk from the stream's value before to the value read, its last.
    """

    path: list[fx.Node]
    adds: list[ResidualAdd] = field(default_factory=list)
    attends: bool = False

    @property
    def read(self) -> fx.Node:
        """Return the value that the branches read."""
        return self.path[-1]


def scan_streams(
    trunk: Trunk, attention: Mapping[fx.Node, int | None]
) -> list[list[Group]]:
    """Return the groups of adds of each stream, in graph order.

    ``attention`` are the nodes of attention and their sites' indices; None for one that
    was not raised. Every node is visited a bounded number of times: the walk back from
    a branch ends where the stream was last read.
    """
    scan = _Scan(trunk, attention)
    for node in trunk.nodes:
        scan.visit(node)
    return scan.streams


class _Scan:
    """Goes through a graph in order and follows the streams add by add."""

    def __init__(self, trunk: Trunk, attention: Mapping[fx.Node, int | None]) -> None:
        self.trunk = trunk
        self.streams: list[list[Group]] = []
        self._values: dict[fx.Node, list[Group]] = {}  # the newest value of each stream
        self._sites = attention
        self._places = sorted(trunk.order[node] for node in self._sites)
        self._joined: set[fx.Node] = set()

    def visit(self, node: fx.Node) -> None:
        """Take ``node`` into a stream when it is a residual add."""
        operands = _operands(node)
        for value, branch in (operands, operands[::-1]) if operands else ():
            path = self.trunk.path(value)
            if self._join(node, path, branch) or self._start(node, path, branch):
                return

    def _join(self, node: fx.Node, path: list[fx.Node], branch: fx.Node) -> bool:
        """Add to the stream whose newest value the path leads back to."""
        end = next((i for i, n in enumerate(path) if n in self._values), None)
        if end is None:
            return False
        path = path[end::-1]
        groups = self._values[path[0]]
        last = groups[-1].read
        known = self.trunk.ancestors(branch, self.trunk.order[last], {*path, last})
        places = [i for i, n in enumerate(path) if n in known]
        if places:
            groups.append(Group(path[: places[-1] + 1]))
        elif last not in known:
            return False
        self._add(groups, node, branch, known)
        return True

    def _start(self, node: fx.Node, path: list[fx.Node], branch: fx.Node) -> bool:
        """Begin a stream where the latest attention first comes back to one."""
        place = bisect_left(self._places, self.trunk.order[node]) - 1
        if place < 0 or self._site(place) in self._joined:
            return False
        for floor in self._floors(place):
            known = self.trunk.ancestors(branch, floor, set(path))
            if self._site(place) not in known:
                continue
            attends = self.trunk.ancestors(self._site(place), floor, set(path))
            read = next((n for n in path if n in attends), None)
            if read is not None:
                groups = [Group([read])]
                self.streams.append(groups)
                self._add(groups, node, branch, known)
                return True
        return False

    def _floors(self, place: int) -> list[int]:
        """Return what the branch of the attention at ``place`` may be behind.

        The attention before it; or that before this one, when the two stand side by
        side in one branch, as in differential attention.
        """
        before = [self._places[i] + 1 if i >= 0 else 0 for i in (place - 1, place - 2)]
        if place == 0 or self._site(place - 1) in self._joined:
            return before[:1]
        behind = self.trunk.ancestors(self._site(place), before[1], ())
        return before[:1] if self._site(place - 1) in behind else before

    def _site(self, place: int) -> fx.Node:
        return self.trunk.nodes[self._places[place]]

    def _add(
        self, groups: list[Group], node: fx.Node, branch: fx.Node, known: set[fx.Node]
    ) -> None:
        sites = (self._sites.keys() & known) - self._joined
        indices = [self._sites[site] for site in sites]
        known_indices = tuple(sorted(i for i in indices if i is not None))
        group = groups[-1]
        group.attends |= bool(sites)
        group.adds.append(ResidualAdd(node, group.read, branch, known_indices))
        self._joined |= sites
        self._values = {n: g for n, g in self._values.items() if g is not groups}
        self._values[node] = groups


def _operands(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """Return both operands of a sum of two hidden states, or None."""
    if op_name(node) not in _ADDS or len(node.args) < 2:
        return None
    left, right = node.args[:2]
    if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
        return None
    ranks = {len(shape_of(n) or ()) for n in (left, right, node)}
    same = width(left) == width(right) is not None and ranks in ({2}, {3})
    return (left, right) if same and is_floating(node) else None
