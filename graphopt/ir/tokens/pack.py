"""Lay the prompts of a padded batch end to end: the layers run on real tokens only."""

from __future__ import annotations

import operator
from dataclasses import dataclass

import torch
from torch import fx

from graphopt.ir.attention.site import AttentionSite
from graphopt.ir.casts import skip_casts
from graphopt.ir.dce import eliminate_dead_code
from graphopt.ir.match import shape_of, value_of
from graphopt.ir.model_graph import ModelGraph
from graphopt.ir.replace import call, key_mask_of, substitute
from graphopt.ir.tokens.drop import crossing_tokens, scale_of
from graphopt.ir.tokens.region import (
    first_reader,
    has_tokens,
    one_stream,
    places,
    require_before,
    takes_places,
    token_axis,
)
from graphopt.ir.tokens.substitute import substitute_tokens
from graphopt.ir.vision.insert import insert
from graphopt.ir.vision.span import descendants

_ops = torch.ops.graphopt


@dataclass(frozen=True)
class Packing:
    """Bins or none, and how many of them are reserved; 0 goes by the data."""

    bins: bool = False
    room: int = 0


@dataclass(frozen=True)
class _Layout:
    """Where packed tokens lie, as `graphopt.ops.tokens.pack_prompts` returns it."""

    places: fx.Node
    starts: fx.Node
    lengths: fx.Node
    slots: fx.Node
    padding: fx.Node  # the mask of the padded batch, and packed
    mask: fx.Node


def pack_tokens(model: ModelGraph, packing: Packing) -> None:
    """Edit the graph; PassError where it cannot follow: the caller keeps a copy.

    The residual stream and what goes with it (cosines, sines, positions) are packed in
    front of the first layer. Attention runs prompt by prompt; what leaves the layers
    (keys and values for a cache, the tokens whose logits are wanted, outputs) gets its
    padded form back.
    """
    _ = model.symbols  # before nodes of the packed length go in
    point = first_reader(model, one_stream(model).input)
    layout = _insert_layout(model, point, packing)
    for site in model.attention:
        _pack_attention(model, site, layout)
    eliminate_dead_code(model.gm)
    read = crossing_tokens(model, layout.mask.next)
    crossing = [node for node in read if node is not layout.slots]
    _restore_outputs(model, crossing, layout)
    with model.gm.graph.inserting_after(layout.mask):
        packed = {x: _packed(model, x, layout.places) for x in reversed(crossing)}
    found = {x: packed[x] for x in crossing} | {layout.padding: layout.mask}
    substitute_tokens(model, found, tokenwise=True)


def _insert_layout(model: ModelGraph, point: fx.Node, packing: Packing) -> _Layout:
    graph, site = model.gm.graph, model.attention[0]
    require_before(graph, site.key_mask, point)
    with graph.inserting_before(point):
        mask = key_mask_of(graph, site)
        assert mask is not None
        known = _on_host(graph, mask)
        options = (packing.bins, packing.room)
        packed = call(graph, _ops.pack_prompts.default, (known, *options))
        places, starts, lengths, slots = (
            _on_device(graph, insert(graph, operator.getitem, packed, i), mask)
            for i in range(4)
        )
        shown = call(graph, _ops.take_packed.default, (mask, places, 1))
    return _Layout(places, starts, lengths, slots, mask, shown)


def _on_device(graph: fx.Graph, node: fx.Node, like: fx.Node) -> fx.Node:
    device = value_of(like).device
    if value_of(node).device == device:
        return node
    return insert(graph, "to", node, device, non_blocking=True)


def _on_host(graph: fx.Graph, mask: fx.Node) -> fx.Node:
    """Return the mask as the host gave it, where it did: no need to wait for a GPU."""
    source = skip_casts(mask)
    moved = shape_of(source) == shape_of(mask)
    if moved and value_of(source).device != value_of(mask).device:
        return insert(graph, "ne", source, 0)
    return mask


def _pack_attention(model: ModelGraph, site: AttentionSite, layout: _Layout) -> None:
    graph = model.gm.graph
    with graph.inserting_before(site.node):
        where = (layout.starts, layout.lengths, layout.slots)
        pattern = (site.pattern, [0], [site.window])
        logits = (scale_of(site), site.softcap)
        args = (
            site.query,
            site.key,
            site.value,
            *where,
            layout.mask,
            *pattern,
            *logits,
        )
        node = call(graph, _ops.packed_attention.default, args)
    substitute(model.gm, site.node, node)


def _packed(model: ModelGraph, node: fx.Node, places: fx.Node) -> fx.Node:
    """Insert ``node`` [B or 1, ..., T, ...] with the packed tokens."""
    axis = token_axis(model, node)
    return call(model.gm.graph, _ops.take_packed.default, (node, places, axis))


def _restore_outputs(
    model: ModelGraph, crossing: list[fx.Node], layout: _Layout
) -> None:
    """Insert the padded form of what readers outside the layers take from them."""
    graph = model.gm.graph
    order = places(graph)
    for node in sorted(descendants(graph, crossing), key=lambda n: order[n]):
        if order[node] <= order[layout.mask] or not has_tokens(model, node):
            continue
        outside = [user for user in node.users if takes_places(model, user, node)]
        if outside:
            with graph.inserting_after(node):
                args = (node, layout.slots, token_axis(model, node))
                padded = call(graph, _ops.unpack_tokens.default, args)
            for user in outside:
                user.replace_input_with(node, padded)
