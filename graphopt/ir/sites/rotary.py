"""Rotary sites: where queries and keys are rotated, and by which positions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import fx

from graphopt.ir.attention.site import AttentionSite
from graphopt.ir.caches.sites import CacheSite
from graphopt.ir.casts import CASTS
from graphopt.ir.match import argument, op_name
from graphopt.ir.sites.norms import NormSite
from graphopt.ir.sites.positions import Positions, trace_positions
from graphopt.ir.sites.rotation import Rotation, find_rotations

_PASSIVE = (
    *(*CASTS, "contiguous", "clone", "dropout"),
    *("transpose", "permute", "expand", "mul", "div"),
)
_MAX_STEPS = 12
_VIEWS = ("unsqueeze", "expand", "repeat_interleave", "contiguous")


@dataclass(frozen=True)
class RotarySite:
    """The rotary embedding of attention ``index``.

    ``cos`` and ``sin`` [B or 1, S, rotary_dim or half of it] are the values before the
    layer shapes them for its heads; layers often share them. ``key`` is None where the
    key is put together otherwise (multi-head latent attention).
    """

    index: int
    query: Rotation
    key: Rotation | None
    cos: fx.Node
    sin: fx.Node
    positions: Positions | None

    @property
    def form(self) -> str:
        """Return half or interleaved; see `Rotation`."""
        return self.query.form

    @property
    def rotary_dim(self) -> int:
        """Return the channels of a head that are rotated."""
        return self.query.rotary_dim


def find_rotary(
    gm: fx.GraphModule,
    attention: Sequence[AttentionSite],
    caches: Sequence[CacheSite],
    norms: Sequence[NormSite],
) -> list[RotarySite]:
    """Return the rotary sites in graph order.

    ``norms`` may follow a rotation; ``caches`` tell a layer's own keys from past ones.
    """
    finder = _Finder(find_rotations(gm.graph), norms)
    new_keys = {site.index: site.key.new for site in caches}
    found = [finder.site(a, new_keys.get(a.index) or a.key) for a in attention]
    return [site for site in found if site is not None]


class _Finder:
    """Finds the rotation behind an attention's operands."""

    def __init__(
        self, rotations: dict[fx.Node, Rotation], norms: Sequence[NormSite]
    ) -> None:
        self._rotations = rotations
        self._norms = {site.output: site.input for site in norms}
        self._positions: dict[fx.Node, Positions | None] = {}

    def site(self, attention: AttentionSite, new_key: fx.Node) -> RotarySite | None:
        """Return the site of ``attention``, None when its query is not rotated."""
        query, key = self._behind(attention.query), self._behind(new_key)
        if query is None:
            return None
        cos, sin = _shared(query.cos), _shared(query.sin)
        if cos not in self._positions:
            self._positions[cos] = trace_positions(cos)
        return RotarySite(attention.index, query, key, cos, sin, self._positions[cos])

    def _behind(self, node: fx.Node) -> Rotation | None:
        """Return the rotation from which ``node`` comes, channels in their places.

        A norm or a scale may follow the rotation.
        """
        current: Any = node
        for _ in range(_MAX_STEPS):
            if not isinstance(current, fx.Node) or current in self._rotations:
                break
            if current in self._norms:
                current = self._norms[current]
            elif op_name(current) in _PASSIVE and current.args:
                current = current.args[0]
            else:
                return None
        return self._rotations.get(current)


def _shared(factor: fx.Node) -> fx.Node:
    """Return what the layer's views of cos or sin were taken from."""
    node, base = factor, factor
    while isinstance(source := node.args[0] if node.args else None, fx.Node):
        if op_name(node) in _VIEWS or _adds_axis(node) or _keeps_channels(node):
            base = source
        elif op_name(node) not in CASTS:
            break
        node = source
    return base


def _adds_axis(node: fx.Node) -> bool:
    index = argument(node, 1, "index")
    if op_name(node) != "getitem" or not isinstance(index, tuple):
        return False
    return all(i is None or i is Ellipsis or i == slice(None) for i in index)


def _keeps_channels(node: fx.Node) -> bool:
    """Tell whether ``node`` is a slice of the last axis only."""
    index = argument(node, 1, "index")
    if op_name(node) != "getitem" or not isinstance(index, tuple):
        return False
    return isinstance(index[-1], slice) and all(
        i is Ellipsis or i == slice(None) for i in index[:-1]
    )
