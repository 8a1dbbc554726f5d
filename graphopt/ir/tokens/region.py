"""The part of a graph whose tokens a pass lays out anew: from stream to outputs."""

from __future__ import annotations

from torch import fx

from graphopt.errors import PassError
from graphopt.ir.match import op_name, shape_of
from graphopt.ir.model_graph import ModelGraph
from graphopt.ir.stream.residual import ResidualStream
from graphopt.ir.stream.trunk import SELECTING
from graphopt.ir.tokens.kept import token_sizes

# They write tokens to a cache.
_KEEPING = ("graphopt.append_pages", "graphopt.write_tokens")


def one_stream(model: ModelGraph) -> ResidualStream:
    """Return the model's one residual stream; PassError where there are more."""
    if len(model.residual) != 1:
        raise PassError(f"the graph has {len(model.residual)} stacks of layers")
    return model.residual[0]


def places(graph: fx.Graph) -> dict[fx.Node, int]:
    """Return the place of each node in the graph's order."""
    return {node: place for place, node in enumerate(graph.nodes)}


def first_reader(model: ModelGraph, stream: fx.Node) -> fx.Node:
    """Return the first node that reads the stream on the way to attention's queries.

    A mask that the model builds may read it before, for its dtype or its sizes.
    """
    found, pending = set(), [model.attention[0].query]
    while pending:
        fresh = [n for n in pending.pop().all_input_nodes if n not in found]
        found.update(fresh)
        pending += fresh
    order = places(model.gm.graph)
    readers = [n for n in stream.users if n in found] or list(stream.users)
    return min(readers, key=lambda node: order[node])


def require_before(graph: fx.Graph, mask: fx.Node | None, point: fx.Node) -> None:
    """Raise PassError unless the mask of padding is there before the layers."""
    order = places(graph)
    if mask is None or order[mask] > order[point]:
        raise PassError("the mask of padding is made inside the layers")


def token_axis(model: ModelGraph, node: fx.Node) -> int:
    """Return the axis of tokens of ``node`` [B or 1, ..., T, ...]; PassError else."""
    symbol, sizes = token_sizes(model)
    axes = [i for i, size in enumerate(sizes(node)) if size == symbol]
    if len(axes) != 1 or axes[0] == 0:
        text = f"{node.name} {shape_of(node)} has not one axis of tokens in its rows"
        raise PassError(text)
    return axes[0]


def has_tokens(model: ModelGraph, node: fx.Node) -> bool:
    """Tell whether a size of ``node`` counts tokens."""
    symbol, sizes = token_sizes(model)
    return any(symbol in size.free_symbols for size in sizes(node))


def takes_places(model: ModelGraph, user: fx.Node, node: fx.Node) -> bool:
    """Tell whether ``user`` takes tokens of ``node`` by their places.

    It returns them, writes them to a cache, or selects some.
    """
    if user.op == "output" or op_name(user) in _KEEPING:
        return True
    if op_name(user) not in SELECTING or user.args[0] is not node:
        return False
    symbol, sizes = token_sizes(model)
    return symbol in sizes(node) and symbol not in sizes(user)
