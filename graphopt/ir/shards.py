"""Which part of a model's heads and neurons a rank has, and what all ranks have of it.

What a pass chooses by a mean over heads it has to choose by the mean over all of them:
ranks that drop other tokens would sum hidden states of different tokens, and agree with
one another on a wrong result. What it chooses among neurons it chooses among all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import torch
from torch import fx

from graphopt.ir.attention.site import AttentionSite
from graphopt.ir.collectives import group_of, sum_over_ranks, summed_behind
from graphopt.ir.replace import call
from graphopt.ir.sites.ffn import FfnSite

if TYPE_CHECKING:
    from graphopt.ir.model_graph import ModelGraph

_Row = TypeVar("_Row")


@dataclass(frozen=True)
class RankShare:
    """Rank ``rank`` of ``ranks`` has that part of the heads or neurons, in order."""

    rank: int = 0
    ranks: int = 1

    def part(self, rows: Sequence[_Row]) -> Sequence[_Row]:
        """Return this rank's part of ``rows``, one for each head of the whole model."""
        count = len(rows) // self.ranks
        return rows[self.rank * count : (self.rank + 1) * count]


def summed_heads(model: ModelGraph, site: AttentionSite) -> fx.Node | None:
    """Return the sum over ranks behind ``site``; None where every rank has all heads.

    PassError where the ranks' parts meet otherwise.
    """
    return _summed(model, site.node)


def summed_neurons(model: ModelGraph, site: FfnSite) -> fx.Node | None:
    """Return the sum over ranks behind an FFN; None where every rank has all neurons.

    PassError where the ranks' parts meet otherwise.
    """
    return _summed(model, site.down)


def _summed(model: ModelGraph, node: fx.Node) -> fx.Node | None:
    adds = {add.node for stream in model.residual for add in stream.adds}
    return summed_behind(node, adds)


def share_of_heads(model: ModelGraph, site: AttentionSite) -> RankShare:
    """Return which of the model's heads ``site`` has; PassError where none can tell."""
    return share_of(summed_heads(model, site))


def share_of(like: fx.Node | None) -> RankShare:
    """Return the part of this rank among those of the sum ``like``; all without one.

    PassError where its operator does not name the ranks.
    """
    if like is None:
        return RankShare()
    group = group_of(like)
    return RankShare(group.rank(), group.size())


def mean_of_heads(graph: fx.Graph, like: fx.Node | None, value: fx.Node) -> fx.Node:
    """Insert the mean over all heads of ``value``, the mean over those of this rank.

    ``like`` is what `summed_heads` found; with None this rank has all heads. Every rank
    has as many.
    """
    if like is None:
        return value
    total = sum_over_ranks(graph, like, value)
    ranks = group_of(like).size()
    return call(graph, torch.ops.aten.div.Scalar, (total, ranks))
