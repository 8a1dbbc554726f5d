"""Insert calls into a graph with the values that fake tensors give."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from graphopt import _compat


def insert(
    graph: fx.Graph,
    target: Callable[..., Any],
    args: tuple[Any, ...],
    kwargs: dict[str, Any] | None = None,
) -> fx.Node:
    """Insert a call at the graph's place of insertion; infer its value."""
    node = graph.call_function(target, args, kwargs)
    refresh(node)
    return node


def refresh(node: fx.Node) -> None:
    """Infer the value of a call from those of its arguments."""
    values: list[Any] = []

    def load(source: fx.Node) -> Any:
        value = source.meta["example_value"]
        values.extend(value if isinstance(value, (tuple, list)) else [value])
        return value

    args, kwargs = fx.map_arg(node.args, load), fx.map_arg(node.kwargs, load)
    tensors = [v for v in values if isinstance(v, torch.Tensor)]
    mode: Any = getattr(tensors[0], "fake_mode", None)
    with mode, _compat.discarding_sizes(mode):
        if node.op == "call_method":
            found = getattr(args[0], str(node.target))(*args[1:], **kwargs)
        else:
            found = node.target(*args, **kwargs)  # type: ignore[operator]
    node.meta["example_value"] = found


def sort(graph: fx.Graph) -> None:
    """Put every node behind its inputs, otherwise in the order in which they are.

    Only for graphs without calls that write to their inputs.
    """
    nodes = list(graph.nodes)
    place = {node: i for i, node in enumerate(nodes)}
    missing = {node: len(node.all_input_nodes) for node in nodes}
    ready = [place[node] for node in nodes if not missing[node]]
    last = None
    while ready:
        node = nodes[heapq.heappop(ready)]
        if last is not None:
            last.append(node)
        last = node
        for user in node.users:
            missing[user] -= 1
            if not missing[user]:
                heapq.heappush(ready, place[user])
