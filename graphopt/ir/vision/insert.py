"""Insert calls whose values are inferred as they go in."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphopt import _compat
from graphopt.ir.match import value_of
from graphopt.ir.sizes.fake_runs import apply


def insert(graph: fx.Graph, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
    """Insert a call at the insertion point: a method for a name, else a function."""
    make = graph.call_method if isinstance(target, str) else graph.call_function
    return inferred(make(target, args, kwargs))


def inferred(node: fx.Node) -> fx.Node:
    """Give ``node`` the value that its arguments' values lead to; return it."""
    args, kwargs = fx.map_arg((node.args, node.kwargs), value_of)
    owner = node.graph.owning_module
    assert owner is not None
    mode = _compat.fake_mode_of(owner)
    with mode, _compat.discarding_sizes(mode), torch.no_grad():
        node.meta["example_value"] = apply(node, args, kwargs)
    return node
