"""Drop tokens after a layer: the rest of the graph runs on those that stay."""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import fx

from graphopt.errors import PassError
from graphopt.ir.attention.site import AttentionSite
from graphopt.ir.match import float_of, shape_of, sizes_of, value_of
from graphopt.ir.model_graph import ModelGraph
from graphopt.ir.replace import call, key_mask_of
from graphopt.ir.shards import mean_of_heads, summed_heads
from graphopt.ir.stream.layers import Layer
from graphopt.ir.tokens.kept import token_sizes
from graphopt.ir.tokens.returning import Returning
from graphopt.ir.tokens.substitute import substitute_tokens
from graphopt.ir.vision.span import descendants

_ops = torch.ops.graphopt


@dataclass(frozen=True)
class Drop:
    """Behind layer ``layer`` the share ``keep`` of the tokens that reach it stays.

    ``scores`` [B, S] is a node of scores of the tokens that reach the layer; None takes
    tokens at equal distances. ``pool`` averages neighbours into that many instead.
    ``left``: where those that go leave their hidden states, and the number of the drop.
    """

    layer: int
    keep: Fraction
    scores: fx.Node | None
    pool: bool = False
    left: tuple[Returning, int] | None = None


@dataclass(frozen=True)
class Ranking:
    """The attention of how many last tokens ranks, and how many neighbours count."""

    observe: int = 1
    smooth: int = 1

    def smoothed(self, graph: fx.Graph, scores: fx.Node) -> fx.Node:
        """Insert the greatest scores among neighbours; scores [B, S]."""
        if self.smooth == 1:
            return scores
        return call(graph, _ops.smooth_scores.default, (scores, self.smooth))


def attention_scores(model: ModelGraph, layer: Layer, ranking: Ranking) -> fx.Node:
    """Insert behind ``layer`` its last tokens' attention to each token, [B, S]."""
    site, graph = layer.attention, model.gm.graph
    like = summed_heads(model, site)
    with graph.inserting_before(stream_behind(layer).next):
        mask = key_mask_of(graph, site)
        logits = (scale_of(site), site.softcap, site.window)
        args = (site.query, site.key, mask, *logits, ranking.observe)
        scores = call(graph, _ops.token_scores.default, args)
        scores = mean_of_heads(graph, like, scores)
        return ranking.smoothed(graph, scores)


def spread_scores(model: ModelGraph, layer: Layer, seed: int) -> fx.Node:
    """Insert behind ``layer`` scores that depend on places alone, [B, S]."""
    stream = stream_behind(layer)
    with model.gm.graph.inserting_before(stream.next):
        return call(model.gm.graph, _ops.spread_scores.default, (stream, seed))


def drop_tokens(model: ModelGraph, drop: Drop, is_first: bool = True) -> None:
    """Edit the graph; PassError where it cannot follow: the caller keeps a copy.

    Drops of one graph are made from the deepest layer to the first, which ``is_first``:
    then what is behind a drop follows the earlier one, its counts too, and values are
    inferred once. Kept tokens stay in their order and keep their positions: cosines,
    sines and masks are gathered with them. A token that is a mean of several has the
    position of the last of them.
    """
    layer, graph = model.layers[drop.layer], model.gm.graph
    stream = stream_behind(layer)
    _ = model.symbols  # before nodes of T' go in
    point = stream.next
    if drop.scores is not None:
        point = max(point, drop.scores.next, key=list(graph.nodes).index)
    crossing = crossing_tokens(model, point)
    with graph.inserting_before(point):
        kept = _kept(graph, layer, drop)
        if drop.left is not None:
            returning, number = drop.left
            returning.leave(graph, stream, kept, number)
        gathered = {}
        for node in crossing:
            if drop.pool and node is stream:
                args = (stream, kept, key_mask_of(graph, layer.attention))
                gathered[node] = call(graph, _ops.pool_tokens.default, args)
            else:
                gathered[node] = _taken(model, node, kept)
    substitute_tokens(model, gathered, infer=is_first)


def drop_chosen(
    model: ModelGraph, point: fx.Node, choose: Callable[[], fx.Node]
) -> None:
    """Go on from ``point`` with the places [B, S'] that ``choose`` inserts there.

    Like `drop_tokens`, with any rule for what stays.
    """
    _ = model.symbols  # before nodes of T' go in
    crossing = crossing_tokens(model, point)
    with model.gm.graph.inserting_before(point):
        kept = choose()
        gathered = {node: _taken(model, node, kept) for node in crossing}
    substitute_tokens(model, gathered)


def _kept(graph: fx.Graph, layer: Layer, drop: Drop) -> fx.Node:
    """Insert the places of the tokens that stay, [B, S']."""
    stream, scores = stream_behind(layer), drop.scores
    mask = key_mask_of(graph, layer.attention)
    count = kept_count(graph, stream, drop.keep)
    if drop.pool:
        return call(graph, _ops.pool_places.default, (stream, count, mask))
    even = scores is None
    if scores is None:
        scores = call(graph, _ops.spread_scores.default, (stream, 0))
    return call(graph, _ops.keep_tokens.default, (scores, count, mask, even))


def scale_of(site: AttentionSite) -> float:
    """Return the scale of a site's logits; PassError where it is computed."""
    if site.scale is None:
        return float(site.head_dim**-0.5)
    known = float_of(site.scale)
    if known is None:
        raise PassError(f"attention[{site.index}] has a scale that is computed")
    return known


def stream_behind(layer: Layer) -> fx.Node:
    """Return the residual stream that leaves a layer; PassError without one."""
    if layer.output is None:
        raise PassError(f"the stream behind layer {layer.index} is no single value")
    return layer.output


def crossing_tokens(model: ModelGraph, point: fx.Node) -> list[fx.Node]:
    """Return what nodes from ``point`` on read of earlier ones, by tokens."""
    order = list(model.gm.graph.nodes)
    cut = order.index(point)
    later = {node for node in order[cut:] if node.op != "output"}
    symbol, sizes = token_sizes(model)
    return [
        node
        for node in order[:cut]
        if not later.isdisjoint(node.users) and symbol in sizes(node)
    ]


def kept_count(graph: fx.Graph, stream: fx.Node, keep: Fraction) -> fx.Node:
    """Insert ceil(keep * S), from the size of ``stream`` [B, S, ...]."""
    tokens = _number(graph, torch.ops.aten.sym_size.int, stream, 1)
    scaled = _number(graph, operator.mul, tokens, keep.numerator)
    raised = _number(graph, operator.add, scaled, keep.denominator - 1)
    return _number(graph, operator.floordiv, raised, keep.denominator)


def _number(graph: fx.Graph, target: Any, *args: Any) -> fx.Node:
    node = graph.call_function(target, args)
    node.meta["example_value"] = target(*(value_of(a) for a in args))
    return node


def _taken(model: ModelGraph, node: fx.Node, kept: fx.Node) -> fx.Node:
    """Insert ``node`` with the kept tokens; a mask [B, 1, S, S] on both axes."""
    symbol, sizes = token_sizes(model)
    axes = [i for i, size in enumerate(sizes(node)) if size == symbol]
    batch = sizes_of(kept)[0]
    if axes[0] == 0 or sizes_of(node)[0] not in (1, batch):
        text = f"{node.name} {shape_of(node)} has tokens but no axis of batch rows"
        raise PassError(text)
    for axis in axes:
        args = (node, kept, axis)
        node = call(model.gm.graph, _ops.take_tokens.default, args)
    return node


def returns_tokens(model: ModelGraph) -> str:
    """Return the name of an output of the layers with an axis of tokens, or ''."""
    symbol, sizes = token_sizes(model)
    output = model.gm.graph.find_nodes(op="output")[0]
    made = descendants(model.gm.graph, [model.layers[0].attention.node])
    for node in output.all_input_nodes:
        if node in made and any(symbol in size.free_symbols for size in sizes(node)):
            return node.name
    return ""
