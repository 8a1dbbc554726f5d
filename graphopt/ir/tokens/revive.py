"""A decoding step in which dropped tokens come back (LazyLLM, section 3.3).

Behind each layer of the schedule the new token's attention chooses afresh among the
tokens that the layer saw. Those chosen that were never computed deeper join the step
with their hidden states and positions, and write their keys and values to the layers
that follow: the graph, traced for one token, goes on with several.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from graphopt.errors import PassError
from graphopt.ir.attention.pages import PageRead, read_of, size_without_reading
from graphopt.ir.attention.site import AttentionSite
from graphopt.ir.caches.sites import is_given
from graphopt.ir.match import is_own, value_of
from graphopt.ir.model_graph import ModelGraph
from graphopt.ir.replace import call, key_mask_of, substitute
from graphopt.ir.shards import mean_of_heads, summed_heads
from graphopt.ir.tokens.drop import Drop, Ranking, kept_count, scale_of, stream_behind
from graphopt.ir.tokens.returning import (
    Returning,
    note_tokens,
    positions_of,
    write_at_places,
)
from graphopt.ir.tokens.substitute import substitute_tokens
from graphopt.ir.vision.span import descendants

_ops = torch.ops.graphopt


@dataclass(frozen=True)
class _Point:
    """Where tokens come back: ``gathered`` maps nodes of one token to those of several.

    ``alike``: the streams behind the layers up to the next point.
    """

    gathered: dict[fx.Node, fx.Node]
    alike: tuple[fx.Node, ...]
    is_first: bool


def revive_tokens(model: ModelGraph, drops: Sequence[Drop], ranking: Ranking) -> None:
    """Edit a decoding graph; PassError where it cannot: the caller keeps a copy.

    ``drops`` in the order of their layers, as in the prefill; their scores are not
    used. The cache must hold hidden states. The new token alone is observed.
    """
    position = positions_of(model, drops[0].layer + 1)
    streams = [stream_behind(layer) for layer in model.layers]
    sites = list(model.attention)
    reads = [_read(site) for site in sites]
    sums = [summed_heads(model, site) for site in sites]  # before sites are replaced
    graph, tokens = model.gm.graph, _token_inputs(model)
    first = note_tokens(model, position)
    write_at_places(model, sites[drops[0].layer + 1 :], first)
    points, seen = [], None
    ends = [*(drop.layer for drop in drops[1:]), len(sites) - 1]
    for number, (drop, end) in enumerate(zip(drops, ends, strict=True)):
        layer, stream = drop.layer, streams[drop.layer]
        with graph.inserting_before(stream.next):
            if seen is None:
                seen = _all_places(graph, sites[layer], reads[layer], first)
            scores = _scores(graph, sites[layer], reads[layer], seen)
            scores = mean_of_heads(graph, sums[layer], scores)
            scores = ranking.smoothed(graph, scores)
            count = kept_count(graph, seen, drop.keep)
            args = (scores, seen, count)
            seen = call(graph, _ops.keep_places.default, args)
            gathered = _joined(graph, stream, position, seen, first, number)
        alike = tuple(streams[layer + 1 : end + 1])
        points.append(_Point(gathered, alike, number == 0))
        for site, read in zip(sites, reads, strict=True):
            if layer < site.index <= end:
                _attend(model.gm, site, read, first.places, seen)
    _narrow(graph, streams[-1])
    for point in reversed(points):
        _widen(model, point, position, tokens)


def _read(site: AttentionSite) -> PageRead:
    node = read_of(site)
    read = None if node is None else PageRead.of(node)
    if read is None:
        raise PassError(f"attention[{site.index}] does not read whole pages")
    if site.unsupported or site.window:
        why = site.unsupported or f"a window of {site.window}"
        raise PassError(f"attention[{site.index}] sees {why}")
    return read


def _all_places(
    graph: fx.Graph, site: AttentionSite, read: PageRead, first: Returning
) -> fx.Node:
    mask = key_mask_of(graph, site)
    node = graph.call_function(
        _ops.live_places.default, (mask, first.past, read.tokens)
    )
    past = value_of(first.past)
    with past.fake_mode:
        node.meta["example_value"] = _ops.live_places.default(
            value_of(mask), past, value_of(read.tokens)
        )
    return node


def _scores(
    graph: fx.Graph, site: AttentionSite, read: PageRead, seen: fx.Node
) -> fx.Node:
    pool = (read.table, read.key_pages, read.key_scales)
    args = (site.query, seen, *pool, scale_of(site), site.softcap)
    return call(graph, _ops.place_scores.default, args)


def _joined(
    graph: fx.Graph,
    stream: fx.Node,
    position: fx.Node | None,
    seen: fx.Node,
    first: Returning,
    number: int,
) -> dict[fx.Node, fx.Node]:
    """Insert what goes on: the new token and those that come back, with all of them."""
    states, depth = first.states, first.depth
    first.leave(graph, stream, None, number)
    places = call(graph, _ops.missing_places.default, (seen, depth, number))
    call(graph, _ops.mark_whole.default, (places, depth))
    found = call(graph, _ops.take_states.default, (states, places, stream))
    joined = {stream: found, first.places: places}
    if position is not None:
        args = (first.positions, places, 1)
        joined[position] = call(graph, _ops.take_tokens.default, args)
    return joined


def _attend(
    gm: fx.GraphModule,
    site: AttentionSite,
    read: PageRead,
    places: fx.Node,
    seen: fx.Node,
) -> None:
    """Let ``site`` read the chosen places instead of a copy of all pages."""
    node = read_of(site)
    assert node is not None
    size_without_reading(node)
    pools = (read.key_pages, read.value_pages, read.key_scales, read.value_scales)
    logits = (scale_of(site), site.softcap)
    args = (site.query, places, seen, read.table, *pools, *logits)
    with gm.graph.inserting_before(site.node):
        new = call(gm.graph, _ops.place_attention.default, args)
    substitute(gm, site.node, new)


def _narrow(graph: fx.Graph, stream: fx.Node) -> None:
    """Let what follows the last layer see the new token alone."""
    with graph.inserting_after(stream):
        last = call(graph, _ops.newest_token.default, (stream,))
    stream.replace_all_uses_with(last, lambda user: user is not last)


def _token_inputs(model: ModelGraph) -> list[fx.Node]:
    """Return the inputs of the call that the residual stream is computed from."""
    stream = model.layers[0].input
    assert stream is not None
    above = {stream}
    for node in reversed(model.gm.graph.nodes):
        if node in above:
            above.update(node.all_input_nodes)
    return [node for node in above if is_given(node)]


def _widen(
    model: ModelGraph,
    point: _Point,
    position: fx.Node | None,
    tokens: Sequence[fx.Node],
) -> None:
    """Let the nodes behind ``point`` run on what goes on from there."""
    graph = model.gm.graph
    order = list(graph.nodes)
    cut = max(order.index(new) for new in point.gathered.values())
    later = {node for node in order[cut + 1 :] if node.op != "output"}
    known = {*point.gathered, *point.gathered.values(), *tokens}
    crossing = [
        node
        for node in order[: cut + 1]
        if not later.isdisjoint(node.users) and node not in known and not is_own(node)
    ]
    copy = _Copies(graph, descendants(graph, [position] if position else []), tokens)
    copy.repeat(crossing, order[cut].next, later, point.gathered)
    # The first point's substitution goes over all that is behind the others.
    substitute_tokens(model, point.gathered, point.alike, infer=point.is_first)


class _Copies:
    """What is computed from positions alone, again behind a point: cosines, sines.

    Copies follow the positions that are there. Nothing else of a single token may be
    read behind it: an axis of 1 would broadcast.
    """

    def __init__(
        self, graph: fx.Graph, by_position: set[fx.Node], tokens: Sequence[fx.Node]
    ) -> None:
        self.graph = graph
        self._by_position = by_position
        self._by_tokens = descendants(graph, tokens)
        self._made: dict[fx.Node, fx.Node] = {}

    def repeat(
        self,
        crossing: Sequence[fx.Node],
        before: fx.Node,
        later: set[fx.Node],
        gathered: dict[fx.Node, fx.Node],
    ) -> None:
        self._made.update((node, node) for node in gathered)
        with self.graph.inserting_before(before):
            for node in crossing:
                self._copy(node)
        for node in crossing:
            for user in list(node.users):
                if user in later and self._made.get(node, node) is not node:
                    user.replace_input_with(node, self._made[node])

    def _copy(self, node: fx.Node) -> fx.Node:
        if node in self._made:
            return self._made[node]
        if node in self._by_tokens:
            raise PassError(f"{node.name} of the new token alone is read behind a drop")
        if node not in self._by_position:
            return node
        for source in node.all_input_nodes:
            self._copy(source)
        self._made[node] = self.graph.node_copy(node, lambda n: self._made.get(n, n))
        return self._made[node]


__all__ = ["revive_tokens"]
