"""Copy a graph: new nodes, the same fake values."""

from __future__ import annotations

from torch import fx

from graphopt._compat import copy_source


def copy_graph(graph: fx.Graph) -> fx.Graph:
    """Return a copy of ``graph`` with nodes of its own, meta shared by value."""
    copy = fx.Graph(graph.owning_module)
    values: dict[fx.Node, fx.Node] = {}
    copy.output(copy.graph_copy(graph, values))
    for node, old in zip(copy.nodes, graph.nodes, strict=True):
        node.meta = dict(old.meta)
        copy_source(old, node)
    copy._codegen = graph._codegen
    return copy


def copy_module(gm: fx.GraphModule) -> fx.GraphModule:
    """Return a module with a copy of the graph that shares parameters and buffers."""
    return fx.GraphModule(gm, copy_graph(gm.graph))
