"""Paths along the residual stream: what carries a token's hidden state unchanged.

The *trunk* of a node leads back through operators that keep each token's vector as it
is or only normalise, scale, shift, reshape or select it. A linear ends it: from there
on the value belongs to a branch (attention or FFN).
"""

from __future__ import annotations

from collections.abc import Container, Iterable

import torch
from torch import fx

from graphopt.ir.casts import CASTS, skip_casts
from graphopt.ir.match import float_of, op_name, shape_of, sizes_of
from graphopt.ir.sites.norms import NormSite

_KEEPING = (*CASTS, "dropout", "contiguous", "clone", "detach", "reshape", "flatten")
_COMMUTING = ("mul", "imul", "mul_", "add", "iadd", "add_")  # with a scale or bias
_SCALING = (*_COMMUTING, "div", "itruediv", "div_")
# Operators that keep some of the tokens, or a mean of neighbours.
_OWN = ("graphopt.take_tokens", "graphopt.pool_tokens")
SELECTING = ("getitem", "gather", "index_select", "take_along_dim", "narrow", *_OWN)
_MAX_STEPS = 24  # between two residual adds; more than any architecture has


class Trunk:
    """Walks the trunks of one graph; ``norms`` are steps although they compute."""

    def __init__(self, graph: fx.Graph, norms: Iterable[NormSite]) -> None:
        self.nodes = list(graph.nodes)
        self.order = {node: place for place, node in enumerate(self.nodes)}
        self._sites = {site.output: site for site in norms}
        self._norms = {site.output: skip_casts(site.input) for site in norms}

    def source(self, node: fx.Node) -> fx.Node | None:
        """Return the node one step back on the trunk of ``node``, or None."""
        if node in self._norms:
            return self._norms[node]
        name = op_name(node)
        source = None
        if name in _KEEPING or name in SELECTING:
            source = node.args[0] if node.args else None
        elif name in _SCALING:
            source = _scaled(node)
        same = isinstance(source, fx.Node) and width(source) == width(node)
        return source if same and width(node) is not None else None  # type: ignore[return-value]

    def path(self, node: fx.Node) -> list[fx.Node]:
        """Return the trunk of ``node``, itself first, back to where it begins."""
        found: list[fx.Node] = [node]
        while len(found) < _MAX_STEPS:
            source = self.source(found[-1])
            if source is None:
                break
            found.append(source)
        return found

    def kind(self, node: fx.Node) -> str:
        """Return how ``node`` carries the stream on: norm, or its operator."""
        return "norm" if node in self._norms else op_name(node)

    def norm(self, node: fx.Node) -> NormSite | None:
        """Return the norm of which ``node`` is the output, if any."""
        return self._sites.get(node)

    def next(self, node: fx.Node, kind: str) -> fx.Node | None:
        """Return the only step of ``kind`` from ``node`` onwards, or None."""
        if kind == "norm":
            steps = [out for out, source in self._norms.items() if source is node]
        else:
            users = [u for u in node.users if self.kind(u) == kind]
            steps = [u for u in users if self.source(u) is node]
        return steps[0] if len(steps) == 1 else None

    def ancestors(
        self, node: fx.Node, floor: int, stop: Container[fx.Node]
    ) -> set[fx.Node]:
        """Return what ``node`` is computed from, itself too.

        Nodes before place ``floor`` and nodes in ``stop`` are returned where they are
        met, but not looked behind.
        """
        found, pending = {node}, [node]
        while pending:
            current = pending.pop()
            if self.order[current] < floor or current in stop:
                continue
            fresh = [n for n in current.all_input_nodes if n not in found]
            found.update(fresh)
            pending += fresh
        return found


def width(node: fx.Node) -> int | None:
    """Return the channels of a tensor, its last size, when that is a number.

    A size may be a SymInt that has been specialised to a number.
    """
    sizes = sizes_of(node)
    return int(sizes[-1]) if sizes and sizes[-1].is_Integer else None


def is_floating(node: fx.Node) -> bool:
    """Tell whether ``node`` is a tensor of floating-point numbers."""
    value = node.meta.get("example_value")
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _scaled(node: fx.Node) -> fx.Node | None:
    """Return x of x * scale, x + bias (in either order) or x / scale."""
    left, right = (*node.args, None, None)[:2]
    if isinstance(left, fx.Node) and _is_scale(right):
        return left
    commutes = op_name(node) in _COMMUTING and _is_scale(left)
    return right if commutes and isinstance(right, fx.Node) else None


def _is_scale(value: object) -> bool:
    """Tell whether ``value`` is one number, or a parameter with one a channel."""
    if not isinstance(value, fx.Node) or shape_of(value) is None:
        return float_of(value) is not None or isinstance(value, fx.Node)
    parameter = value.op in ("placeholder", "get_attr")
    vector = parameter and len(shape_of(value) or ()) == 1
    return vector or all(size == 1 for size in shape_of(value) or ())
