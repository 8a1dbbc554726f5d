"""What the layers of `graphopt.Cache` keep of a prompt whose tokens drop out.

A cache made for it (``dropping``) has a count of tokens in every layer. A layer behind
a drop appends what reaches it, which the graph follows by itself but for the counts and
the padding; in every layer only the tokens may stay that live to the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import fx

from graphopt.ir.attention.pages import read_of
from graphopt.ir.attention.site import AttentionSite
from graphopt.ir.caches.pages import PageWrites
from graphopt.ir.match import argument, op_name, value_of
from graphopt.ir.model_graph import ModelGraph
from graphopt.ir.replace import call, key_mask_of
from graphopt.ir.tokens.returning import holding

_ops = torch.ops.graphopt
_KEY, _VALUE, _PAST, _POOL, _RING = 0, 1, 2, 4, 10  # arguments of append_pages
_CHOICES = (  # the places that stay
    "graphopt.keep_tokens",
    "graphopt.keep_passing",
    "graphopt.pool_places",
)


def cache_refusal(model: ModelGraph) -> str:
    """Return why this prefill's cache cannot hold fewer tokens in some layers."""
    if any(site.kind != "paged" for site in model.caches):
        return "decoding needs graphopt.Cache.from_config(config): it counts by layer"
    appends = [_append(model, site) for site in model.attention]
    if any(read_of(site) for site in model.attention):
        return "the cache holds tokens already; only a first prompt drops some"
    if holding(model.gm) is not None:
        return ""
    if any(node is None or _counter(node) is None for node in appends):
        return "this cache counts once for all layers: Cache.from_config(config)"
    if any(argument(node, _RING, "ring_pages", 0) != 0 for node in appends if node):
        return "streaming heads keep a ring of a prompt's tokens"
    return ""


def count_by_keys(model: ModelGraph) -> None:
    """Let each layer count the keys that reach it: later drops then change counts."""
    graph = model.gm.graph
    for site in model.attention:
        append = _append(model, site)
        counter = None if append is None else _counter(append)
        if append is None or counter is None:
            continue
        key: Any = append.args[_KEY]
        with graph.inserting_before(append):
            counter.args = (counter.args[0], _tokens(graph, key))
        append.prepend(counter)  # it came before the keys


def keep_reached(model: ModelGraph, first: int) -> None:
    """Let the layers from ``first`` on keep no padding: it would leave gaps."""
    for site in model.attention[first:]:
        append = _append(model, site)
        if append is not None and site.key_mask is not None:
            with model.gm.graph.inserting_before(append):
                mask = key_mask_of(model.gm.graph, site)
                assert mask is not None
                _keep(model.gm.graph, append, None, mask)


def keep_final(model: ModelGraph) -> None:
    """Let every layer keep only the tokens that live behind the last drop."""
    graph, last = model.gm.graph, model.attention[-1]
    final = _append(model, last)
    assert final is not None
    # The last layer's mask may be made just before its attention reads it.
    point = max(final.next, last.node, key=list(graph.nodes).index)
    for site in model.attention:
        append = _append(model, site)
        counter = None if append is None else _counter(append)
        if append is None or counter is None:
            continue
        with graph.inserting_before(point):
            places = _composed(graph, _choices_behind(graph, append))
            mask = key_mask_of(graph, last)
        point.prepend(append)
        with graph.inserting_before(append):
            if places is not None or mask is not None:
                _keep(graph, append, places, mask)


def _choices_behind(graph: fx.Graph, node: fx.Node) -> list[fx.Node]:
    nodes = list(graph.nodes)
    return [n for n in nodes[nodes.index(node) :] if op_name(n) in _CHOICES]


def _composed(graph: fx.Graph, kept: Sequence[fx.Node]) -> fx.Node | None:
    """Return the places, among all that reach the first drop, behind the last."""
    if not kept:
        return None
    places = kept[0]
    for later in kept[1:]:
        places = call(graph, _ops.take_tokens.default, (places, later, 1))
    return places


def _keep(
    graph: fx.Graph, append: fx.Node, places: fx.Node | None, mask: fx.Node | None
) -> None:
    """Append only what is at ``places``; of it the real tokens first, and count them.

    ``mask`` bool [B, S'] is of the tokens at ``places``.
    """
    key, value = append.args[_KEY], append.args[_VALUE]
    orders = [places] if places is not None else []
    if mask is not None:
        orders.append(call(graph, _ops.real_first.default, (mask,)))
    for order in orders:
        key, value = (
            call(graph, _ops.take_tokens.default, (x, order, 2)) for x in (key, value)
        )
    append.args = (key, value, *append.args[2:])
    counter = _counter(append)
    assert counter is not None and isinstance(key, fx.Node)
    number = _real(graph, mask) if mask is not None else _tokens(graph, key)
    append.prepend(counter)
    counter.args = (counter.args[0], number)


def _tokens(graph: fx.Graph, key: fx.Node) -> fx.Node:
    size: Any = torch.ops.aten.sym_size.int
    node = graph.call_function(size, (key, 2))
    node.meta["example_value"] = value_of(key).shape[2]
    return node


def _real(graph: fx.Graph, mask: fx.Node) -> fx.Node:
    node = graph.call_method("sum", (mask, 1))
    node.kwargs = {"dtype": torch.int32}
    with value_of(mask).fake_mode:
        node.meta["example_value"] = value_of(mask).sum(1, dtype=torch.int32)
    return node


def _append(model: ModelGraph, site: AttentionSite) -> fx.Node | None:
    return PageWrites(model.gm.graph).append_of(site)


def _counter(append: fx.Node) -> fx.Node | None:
    """Return the node that adds to a count which is this layer's own."""
    past = append.args[_PAST]
    if not isinstance(past, fx.Node) or op_name(past) != "clone":
        return None
    appends = [n for n in past.users if op_name(n) == "graphopt.append_pages"]
    adds = [n for n in past.args[0].users if op_name(n) == "add_"]  # type: ignore
    alone = len({n.args[_POOL] for n in appends}) == 1 and len(adds) == 1
    return adds[0] if alone else None


__all__ = ["cache_refusal", "count_by_keys", "keep_final", "keep_reached"]
