"""Layers: what belongs to one attention site."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from torch import fx

from graphopt.ir.attention.site import AttentionSite
from graphopt.ir.caches.sites import CacheSite
from graphopt.ir.sites.ffn import FfnSite
from graphopt.ir.sites.linear import LinearSite
from graphopt.ir.sites.norms import NormSite
from graphopt.ir.sites.rotary import RotarySite
from graphopt.ir.stream.residual import LayerStream
from graphopt.ir.stream.scan import ResidualAdd

Site = TypeVar("Site")


@dataclass(frozen=True)
class Layer:
    """One transformer layer: its attention, and what follows up to the next one's.

    ``stream`` is its part of the residual stream; ``rotary`` and ``cache`` belong to
    its attention. None where the model has none, or where it was not recognised;
    ``linears`` are those between the stream's ends, so none without a stream.
    """

    index: int
    attention: AttentionSite
    ffn: tuple[FfnSite, ...]
    norms: tuple[NormSite, ...]
    stream: LayerStream | None = None
    rotary: RotarySite | None = None
    cache: CacheSite | None = None
    linears: tuple[LinearSite, ...] = ()

    @property
    def input(self) -> fx.Node | None:
        """Return the residual stream that the layer reads, [B, S, H]."""
        return self.stream.input if self.stream is not None else None

    @property
    def output(self) -> fx.Node | None:
        """Return the residual stream that leaves the layer, [B, S, H]."""
        return self.stream.output if self.stream is not None else None

    @property
    def residual_adds(self) -> tuple[ResidualAdd, ...]:
        """Return the layer's residual adds in graph order."""
        return self.stream.adds if self.stream is not None else ()


def between(
    starts: Sequence[int], sites: Sequence[Site], places: Sequence[int]
) -> list[tuple[Site, ...]]:
    """Return the sites from each start up to the next one."""
    found: list[list[Site]] = [[] for _ in starts]
    for site, place in zip(sites, places, strict=True):
        index = bisect_right(starts, place) - 1
        if index >= 0:
            found[index].append(site)
    return [tuple(part) for part in found]


def inside(
    stream: LayerStream | None, linears: Sequence[LinearSite], order: Mapping[Any, int]
) -> tuple[LinearSite, ...]:
    """Return the linears between the ends of a layer's stream."""
    if stream is None:
        return ()
    first, last = order[stream.input], order[stream.output]
    return tuple(x for x in linears if first < order[x.node] <= last)
