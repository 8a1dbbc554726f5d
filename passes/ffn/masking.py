"""A decoding step's FFN runs on the buffers of the chosen neurons."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphopt import _compat
from graphopt.errors import PassError
from graphopt.ir.match import op_name, shape_of, value_of
from graphopt.ir.model_graph import ModelGraph
from graphopt.ir.replace import call, substitute
from graphopt.ir.sites.linear import operands
from graphopt.ir.sizes.fake_runs import apply
from graphopt.ir.vision.span import descendants
from graphopt.passes.ffn.counting import own_number
from graphopt.passes.ffn.held import Held
from graphopt.passes.ffn.projection import Projection

_ops = torch.ops.graphopt
# Operators whose arguments name sizes of what they give.
_SIZED = ("reshape", "expand", "split", "unflatten", "narrow", "split_with_sizes")


def compute_kept(model: ModelGraph, held: Held, skips: bool) -> None:
    """Put the FFN over the chosen neurons in the place of the dense one.

    The buffers may not be full, as ranks have parts of the chosen that differ in size.
    ``skips``: what is filled of them alone is read, which waits for a number; otherwise
    all, and the rest adds nothing. The old one is left without users. Raises PassError,
    with the graph as it was, where what lies between the projections cannot run on
    fewer neurons.
    """
    graph, site = model.gm.graph, held.layer.ffn[0]
    *ups, down = held.projections(site)
    copies: dict[fx.Node, fx.Node] = {}
    try:
        with graph.inserting_before(site.down):
            valid = None
            if held.summed is not None and skips:
                valid = own_number(graph, held)
            _insert_smaller(model, held, ups, copies, valid)
            inner = copies[operands(site.down)[0]]
            copies[site.down] = _on_buffer(graph, down, inner, valid)
        substitute(model.gm, site.down, copies[site.down])
    except (PassError, ValueError) as error:
        for node in reversed(copies.values()):
            graph.erase_node(node)
        raise PassError(str(error)) from error
    graph.erase_node(held.node)


def _insert_smaller(
    model: ModelGraph,
    held: Held,
    ups: list[Projection],
    copies: dict[fx.Node, fx.Node],
    valid: fx.Node | None,
) -> None:
    graph, site = model.gm.graph, held.layer.ffn[0]
    between = nodes_between(graph, [p.node for p in ups], site.down)
    for projection in ups:
        source = operands(projection.node)[0]
        copies[projection.node] = _on_buffer(graph, projection, source, valid)
    sizes = {n * held.own: n * held.room for n in (1, 2)}
    for node in between:
        copies[node] = _smaller(model.gm, node, copies, sizes)


def nodes_between(
    graph: fx.Graph, starts: list[fx.Node], end: fx.Node
) -> list[fx.Node]:
    """Return the nodes on the ways from ``starts`` to ``end``, in graph order."""
    above: set[fx.Node] = set()
    pending = [end]
    while pending:
        for source in pending.pop().all_input_nodes:
            if source not in above and source not in starts:
                above.add(source)
                pending.append(source)
    below = descendants(graph, starts) - set(starts)
    return [node for node in graph.nodes if node in above and node in below]


def _on_buffer(
    graph: fx.Graph, projection: Projection, source: fx.Node, valid: fx.Node | None
) -> fx.Node:
    """Insert the linear with the gathered weights; a row's own where there are rows."""
    buffer, bias = projection.buffer, projection.bias_buffer
    assert buffer is not None
    bias, scales = projection.bias if bias is None else bias, projection.scales
    is_each, transposed = len(shape_of(buffer) or ()) == 3, projection.transposed
    if is_each and scales is not None:
        given = (source, buffer, bias, False, scales)
        return call(graph, _ops.row_linear.default, given)
    if is_each:
        return call(graph, _ops.row_linear.default, (source, buffer, bias, transposed))
    if scales is not None:
        coded = (source, buffer, bias, scales)
        return call(graph, _ops.weight_only_linear.default, coded)
    if valid is not None:
        how = (valid, projection.is_down, transposed, projection.fused)
        return call(graph, _ops.valid_linear.default, (source, buffer, bias, *how))
    if transposed:
        return call(graph, torch.addmm, (bias, source, buffer))
    return call(graph, torch._C._nn.linear, (source, buffer, bias))


def _smaller(
    gm: fx.GraphModule,
    node: fx.Node,
    copies: dict[fx.Node, fx.Node],
    sizes: dict[int, int],
) -> fx.Node:
    """Insert ``node`` again, over fewer neurons."""

    def resized(leaf: Any) -> Any:
        return sizes.get(leaf, leaf) if type(leaf) is int else leaf

    new = gm.graph.node_copy(node, lambda n: copies.get(n, n))
    copies[node] = new
    if op_name(node) in _SIZED:
        new.args = fx.node.map_aggregate(new.args, resized)
    mode: Any = _compat.fake_mode_of(gm)
    args, kwargs = fx.map_arg((new.args, new.kwargs), value_of)
    try:
        with _compat.trying_fakes(mode):
            new.meta["example_value"] = apply(new, args, kwargs)
    except Exception as error:
        raise PassError(f"{node.name} cannot run on fewer neurons: {error}") from error
    return new
