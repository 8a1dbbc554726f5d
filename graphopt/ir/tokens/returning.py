"""Where a graph keeps the hidden states of tokens that were dropped and may come back.

`graphopt.Cache` with a ``hidden_size`` keeps every token at its place, in all layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt.errors import PassError
from graphopt.ir.attention.site import AttentionSite
from graphopt.ir.caches.pages import PageWrites
from graphopt.ir.match import op_name, shape_of
from graphopt.ir.model_graph import ModelGraph
from graphopt.ir.replace import call

_ops = torch.ops.graphopt
_POOLS = 8  # key, value, past, table and the pools: arguments of append_pages


@dataclass(frozen=True)
class Returning:
    """The tensors of `graphopt.runtime.states.HiddenStates`, and where they are noted.

    ``past`` int32 [B]; ``places`` [B, S] those of the tokens of the call.
    """

    states: fx.Node
    depth: fx.Node
    positions: fx.Node
    past: fx.Node
    places: fx.Node

    def leave(
        self, graph: fx.Graph, stream: fx.Node, kept: fx.Node | None, number: int
    ) -> None:
        """Insert that the tokens of ``stream`` leave their states behind a drop."""
        args = (stream, self.places, kept, self.states, self.depth, number)
        call(graph, _ops.leave_states.default, args)


def holding(gm: fx.GraphModule) -> fx.Node | None:
    """Return the node that counts a call's tokens in a cache with hidden states."""
    found = (n for n in gm.graph.nodes if op_name(n) == "graphopt.hold_tokens")
    return next(found, None)


def positions_of(model: ModelGraph, first: int) -> fx.Node | None:
    """Return the positions [B or 1, S] that rotary embeddings use from ``first`` on.

    None without such embeddings; PassError where they are not found, or are not one.
    """
    sites = [site for site in model.rotary if site.index >= first]
    found = {site.positions.node for site in sites if site.positions is not None}
    if not sites:
        return None
    if len(found) != 1 or any(site.positions is None for site in sites):
        raise PassError("the positions of the rotary embeddings were not found")
    node = found.pop()
    if len(shape_of(node) or ()) != 2:
        raise PassError(f"a token has several positions ({node.name})")
    return node


def note_tokens(model: ModelGraph, position: fx.Node | None) -> Returning:
    """Note the call's tokens in the place of what holds them; return where."""
    graph, hold = model.gm.graph, holding(model.gm)
    assert hold is not None
    states, depth, positions, past, _ = hold.args
    stream = model.layers[0].input
    if stream is None:
        raise PassError("the stream before the first layer is no single value")
    order = list(graph.nodes).index
    after = max([hold, stream, *([position] if position else [])], key=order)
    with graph.inserting_after(after):
        places = call(graph, _ops.new_places.default, (stream, past))
    with graph.inserting_after(places):
        args = (depth, positions, places, position)
        call(graph, _ops.note_tokens.default, args)
    graph.erase_node(hold)
    return Returning(states, depth, positions, past, places)  # type: ignore[arg-type]


def write_at_places(
    model: ModelGraph, sites: Sequence[AttentionSite], returning: Returning
) -> None:
    """Let each of ``sites`` write its keys and values to the places of its tokens."""
    graph, writes = model.gm.graph, PageWrites(model.gm.graph)
    appends = [writes.append_of(site) for site in sites]
    for site, append in zip(sites, appends, strict=True):
        if append is None or append.args[10:11] not in ((), (0,)):
            raise PassError(f"attention[{site.index}] does not write to whole pages")
        key, value, _, *pools = append.args[:_POOLS]
        args: tuple[Any, ...] = (key, value, returning.places, *pools)
        with graph.inserting_before(append):
            call(graph, _ops.write_tokens.default, args)
        graph.erase_node(append)


__all__ = ["Returning", "holding", "note_tokens", "positions_of", "write_at_places"]
