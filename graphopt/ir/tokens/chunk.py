"""Run the layers of a prompt chunk by chunk: a loop takes their place in the graph."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx

from graphopt.errors import PassError
from graphopt.ir.attention.site import AttentionSite
from graphopt.ir.dce import eliminate_dead_code
from graphopt.ir.loops import ChunkLoop
from graphopt.ir.match import value_of
from graphopt.ir.model_graph import ModelGraph
from graphopt.ir.replace import key_mask_of, substitute
from graphopt.ir.tokens.chunk_body import ChunkBody, Exit
from graphopt.ir.tokens.drop import crossing_tokens
from graphopt.ir.tokens.region import (
    first_reader,
    one_stream,
    places,
    require_before,
    takes_places,
    token_axis,
)
from graphopt.ir.tokens.substitute import substitute_tokens
from graphopt.ir.vision.insert import insert

_NAME = "chunks"


def chunk_tokens(model: ModelGraph, chunk: int) -> ChunkLoop:
    """Edit the graph; PassError where it cannot follow: the caller keeps a copy.

    What computes token by token from the residual stream in front of the first layer
    to the one behind the last becomes the body of a loop; keys and values of all chunks
    lie in tensors of the loop. What reads them, or hidden states, gets all tokens.
    """
    _ = model.symbols  # before nodes of a chunk go in
    graph, stream = model.gm.graph, one_stream(model)
    point = first_reader(model, stream.input)
    mask = _mask(model, point)
    sites = {_marked(model, site, mask): site for site in model.attention}
    eliminate_dead_code(model.gm)
    region = _region(model, point, stream.output, mask)
    axes = {x: token_axis(model, x) for x in region.crossing}
    with graph.inserting_before(point):
        whole = insert(graph, all_tokens, stream.input)
        parts = {x: insert(graph, one_chunk, x, chunk, a) for x, a in axes.items()}
    exits = _exits(model, region, whole)
    substitute_tokens(model, parts, tokenwise=True)
    nodes = [n for n in graph.nodes if n in region.body]
    body = ChunkBody(model.gm, parts, sites, mask, chunk)
    given = body.build(nodes, exits)
    loop = ChunkLoop(
        body.module,
        chunk,
        tuple(axes.values()),
        body.states,
        body.results,
        masked=mask is not None,
    )
    with graph.inserting_before(point):
        _call(model.gm, loop, [*region.crossing, *given], exits)
    for node in reversed([*parts.values(), *nodes]):
        graph.erase_node(node)
    graph.erase_node(whole)
    return loop


@dataclass(frozen=True)
class _Region:
    """What computes with chunks, what they are taken from, what reads all tokens."""

    crossing: list[fx.Node]
    body: set[fx.Node]
    outside: set[fx.Node]


def _mask(model: ModelGraph, point: fx.Node) -> fx.Node | None:
    """Return the mask of padding [B, T], made in front of the layers, or None."""
    graph, site = model.gm.graph, model.attention[0]
    if site.key_mask is None:
        return None
    require_before(graph, site.key_mask, point)
    with graph.inserting_before(point):
        return key_mask_of(graph, site)


def attended(query: Tensor, key: Tensor, value: Tensor, mask: Any = None) -> Tensor:
    """Stand for attention until its chunk reads the keys of the chunks before."""
    return query.new_empty((*query.shape[:3], value.shape[-1]))


def all_tokens(x: Tensor) -> Tensor:
    """Stand for the number of tokens of x [B, T, H]; a tensor [T]."""
    return x.new_empty(x.shape[1])


def one_chunk(x: Tensor, size: int, axis: int) -> Tensor:
    """Stand for ``size`` tokens of x."""
    sizes = list(x.shape)
    sizes[axis] = size
    return x.new_empty(sizes)


def joined(x: Tensor, whole: Tensor, axis: int) -> Tensor:
    """Stand for x with the tokens of all chunks, as many as ``whole`` [T] has."""
    sizes = list(x.shape)
    sizes[axis] = whole.shape[0]
    return x.new_empty(sizes)


def _marked(model: ModelGraph, site: AttentionSite, mask: fx.Node | None) -> fx.Node:
    graph = model.gm.graph
    with graph.inserting_before(site.node):
        node = insert(graph, attended, site.query, site.key, site.value, mask)
    return substitute(model.gm, site.node, node)


def _region(
    model: ModelGraph, point: fx.Node, end: fx.Node, mask: fx.Node | None
) -> _Region:
    graph = model.gm.graph
    order = places(graph)
    later = [n for n in graph.nodes if order[n] >= order[point] and n.op != "output"]
    crossing = [x for x in crossing_tokens(model, point) if x is not mask]
    body: set[fx.Node] = set(crossing)
    outside: set[fx.Node] = set()
    for node in later:
        read = node.all_input_nodes
        taken = (takes_places(model, node, n) for n in read if n in body)
        if not outside.isdisjoint(read) or end in read or any(taken):
            outside.add(node)
        elif not body.isdisjoint(read):
            body.add(node)
    body -= set(crossing)
    for node in reversed(later):  # what is made for the body alone goes with it
        if node not in body | outside and node.users and body.issuperset(node.users):
            body.add(node)
    kept = [x for x in crossing if not body.isdisjoint(x.users)]
    for node in kept:
        if not outside.isdisjoint(node.users):
            raise PassError(f"{node.name} is read inside and behind the layers")
    return _Region(kept, body, outside)


def _exits(model: ModelGraph, region: _Region, whole: fx.Node) -> list[Exit]:
    """Insert what stands for all tokens where they are read outside the body."""
    graph, found = model.gm.graph, []
    for node in [n for n in graph.nodes if n in region.body]:
        readers = [u for u in node.users if u in region.outside or u.op == "output"]
        if not readers:
            continue
        axis = token_axis(model, node)
        with graph.inserting_after(node):
            mark = insert(graph, joined, node, whole, axis)
        for user in readers:
            user.replace_input_with(node, mark)
        found.append(Exit(node, mark, axis))
    return found


def _call(
    gm: fx.GraphModule, loop: ChunkLoop, arguments: list[fx.Node], exits: list[Exit]
) -> None:
    """Insert the call of the loop; its results replace what stood for them."""
    gm.add_submodule(_NAME, loop)
    call = gm.graph.call_module(_NAME, tuple(arguments))
    call.meta["example_value"] = values = tuple(
        _result(loop, e, i) for i, e in enumerate(exits)
    )
    for index, found in enumerate(exits):
        item: Any = gm.graph.call_function(operator.getitem, (call, index))
        item.meta = {**found.mark.meta, "example_value": values[index]}
        found.mark.replace_all_uses_with(item)
        gm.graph.erase_node(found.mark)


def _result(loop: ChunkLoop, found: Exit, index: int) -> Any:
    """Return a fake of what the loop gives for an exit."""
    value, result = value_of(found.mark), loop.results[index]
    if not result.state:
        return value
    with value.fake_mode:
        return loop.states[result.index].empty(value.shape[0], value.shape[2])
