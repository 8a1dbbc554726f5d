"""Drop vision tokens alone: text stays, and all rows lose equally many."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import fx

from graphopt.errors import PassError
from graphopt.ir.match import shape_of
from graphopt.ir.replace import call, key_mask_of
from graphopt.ir.shards import mean_of_heads, summed_heads
from graphopt.ir.stream.layers import Layer
from graphopt.ir.tokens.drop import drop_chosen, scale_of, stream_behind
from graphopt.ir.vision.insert import insert
from graphopt.ir.vision.span import LanguageGraph, descendants, vision_mask

_ops = torch.ops.graphopt


@dataclass(frozen=True)
class VisionTokens:
    """Nodes about a prompt's vision tokens, before any drop.

    ``mask`` bool [B, S]; ``number`` of a row, the mean where rows differ; ``protected``
    bool [B, S], those that never go, or None.
    """

    mask: fx.Node
    number: fx.Node
    protected: fx.Node | None = None


@dataclass(frozen=True)
class VisionDrop:
    """Behind ``layer`` of the share ``before`` of the vision tokens ``after`` stays.

    ``scores`` [B, S] is a node; None takes vision tokens at equal distances. With
    ``bound`` the shares mean nothing: what scores less than it goes, in the row where
    the least goes; other rows lose as many. With ``pool`` those that stay become means
    of those that go.
    """

    layer: int
    before: Fraction
    after: Fraction
    scores: fx.Node | None
    bound: float | None = None
    pool: bool = False


def count_vision(
    model: LanguageGraph, protected: fx.Node | None = None
) -> VisionTokens:
    """Insert the mask and the number of the vision tokens of a row."""
    span, graph = model.span, model.gm.graph
    assert span is not None
    with graph.inserting_before(span.node.next):
        mask = vision_mask(graph, span)
        total = _elements(graph, span.writes[0].features)
        for write in span.writes[1:]:
            more = _elements(graph, write.features)
            total = insert(graph, operator.add, total, more)
        row = [_size(graph, span.node, axis) for axis in (0, 2)]
        each = insert(graph, operator.mul, *row)
        number = insert(graph, operator.floordiv, total, each)
    return VisionTokens(mask, number, protected)


def dual_scores(
    model: LanguageGraph, layer: Layer, tokens: VisionTokens, thresholds: Any
) -> fx.Node:
    """Insert behind ``layer`` MustDrop's scores of its tokens, [B, S].

    ``thresholds`` are the global and the individual one.
    """
    site, graph = layer.attention, model.gm.graph
    if site.pattern == "full" or site.unsupported:
        why = site.unsupported or "no causal mask"
        raise PassError(f"attention[{site.index}] cannot be scored: {why}")
    like = summed_heads(model, site)
    with graph.inserting_before(stream_behind(layer).next):
        mask = key_mask_of(graph, site)
        args = (site.query, site.key, tokens.mask, mask, scale_of(site))
        rest = (site.softcap, site.window)
        if like is None:
            return call(graph, _ops.dual_scores.default, (*args, *thresholds, *rest))
        # A maximum is of the mean over the heads of all ranks: that comes first.
        part = call(graph, _ops.text_attention.default, (*args, *rest))
        paid = mean_of_heads(graph, like, part)
        return call(graph, _ops.dual_from.default, (paid, tokens.mask, *thresholds))


def drop_vision(model: LanguageGraph, tokens: VisionTokens, drop: VisionDrop) -> None:
    """Edit the graph; PassError where it cannot follow. See `drop_tokens`."""
    layer, graph = model.layers[drop.layer], model.gm.graph
    stream = stream_behind(layer)
    point = stream.next
    if drop.scores is not None:
        point = max(point, drop.scores.next, key=list(graph.nodes).index)

    def choose() -> fx.Node:
        mask = key_mask_of(graph, layer.attention)
        if drop.bound is not None:
            return _passing(model, tokens, drop, mask)
        alive = [_share(graph, tokens.number, s) for s in (drop.before, drop.after)]
        gone = insert(graph, operator.sub, *alive)
        count = insert(graph, operator.sub, _size(graph, stream, 1), gone)
        even, scores = drop.scores is None, drop.scores
        if scores is None:
            scores = call(graph, _ops.spread_scores.default, (stream, 0))
        args = (scores, tokens.mask, tokens.protected, mask, count, even)
        ranks = call(graph, _ops.vision_ranks.default, args)
        return call(graph, _ops.keep_tokens.default, (ranks, count, mask, False))

    if not drop.pool:
        drop_chosen(model, point, choose)
        return
    order = list(graph.nodes)
    later = order[order.index(point) :]
    with graph.inserting_before(point):
        kept = choose()
        pooled = call(graph, _ops.pool_vision.default, (stream, kept, tokens.mask))
    for user in later:
        if user.op != "output":
            user.replace_input_with(stream, pooled)
    drop_chosen(model, point, lambda: kept)


def _passing(
    model: LanguageGraph, tokens: VisionTokens, drop: VisionDrop, mask: fx.Node | None
) -> fx.Node:
    graph, scores = model.gm.graph, drop.scores
    size = _size(graph, tokens.mask, 1)  # no row has more text than tokens
    args = (scores, tokens.mask, tokens.protected, mask, size)
    ranks = call(graph, _ops.vision_ranks.default, args)
    return call(graph, _ops.keep_passing.default, (ranks, drop.bound, mask))


def drop_before_layers(
    model: LanguageGraph, tokens: VisionTokens, gone: fx.Node, share: Fraction | None
) -> None:
    """Drop the tokens of ``gone`` (bool [B, S]) before the first layer.

    They are ``share`` of the vision tokens, the same number in each row (RuntimeError
    when the model runs and they are fewer); None for a number that depends on data.
    """
    first, graph = model.layers[0], model.gm.graph
    stream = first.input
    if stream is None:
        raise PassError("the first layer's input is no single value")

    def choose() -> fx.Node:
        size = _size(graph, stream, 1)
        count = size
        if share is not None:
            fewer = _share(graph, tokens.number, share)
            count = insert(graph, operator.sub, size, fewer)
        scores = insert(graph, torch.zeros_like, gone, dtype=torch.float32)
        mask = key_mask_of(graph, first.attention)  # the last token stays
        args = (scores, gone, None, mask, count)
        ranks = call(graph, _ops.vision_ranks.default, args)
        if share is not None:
            return call(graph, _ops.keep_tokens.default, (ranks, count, None, False))
        return call(graph, _ops.keep_passing.default, (ranks, 1.0, None))

    drop_chosen(model, _first_step(graph, stream, first), choose)


def _first_step(graph: fx.Graph, stream: fx.Node, layer: Layer) -> fx.Node:
    """Return the first node of ``layer``: masks and rotary angles lie before it."""
    later = descendants(graph, [stream])
    before, pending = set(), [layer.attention.query]
    while pending:
        node = pending.pop()
        if node in later and node not in before:
            before.add(node)
            pending += node.all_input_nodes
    channels = (shape_of(stream) or ())[-1]
    steps = [
        n
        for n in graph.nodes
        if n in before and n is not stream and (shape_of(n) or (0,))[-1] == channels
    ]
    return steps[0]


def _elements(graph: fx.Graph, node: fx.Node) -> fx.Node:
    """Insert the number of elements of a tensor."""
    found = _size(graph, node, 0)
    for axis in range(1, len(shape_of(node) or ())):
        found = insert(graph, operator.mul, found, _size(graph, node, axis))
    return found


def _share(graph: fx.Graph, number: fx.Node, share: Fraction) -> fx.Node:
    """Insert ceil(share * number)."""
    scaled = insert(graph, operator.mul, number, share.numerator)
    raised = insert(graph, operator.add, scaled, share.denominator - 1)
    return insert(graph, operator.floordiv, raised, share.denominator)


def _size(graph: fx.Graph, node: fx.Node, axis: int) -> fx.Node:
    return insert(graph, torch.ops.aten.sym_size.int, node, axis)
