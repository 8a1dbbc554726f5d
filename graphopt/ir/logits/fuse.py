"""Combined logits and the choice of a token as one operator."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphopt.ir.logits.combination import COMBINED, Combination
from graphopt.ir.logits.insert import insert
from graphopt.ir.match import argument, float_of, op_name, shape_of, value_of

SAMPLED = "graphopt.sample_logits"


def to_operator(gm: fx.GraphModule, found: Combination) -> Combination | str:
    """Put ``graphopt::combine_logits`` in the place of plain arithmetic; say why not.

    The operator is as the arithmetic where logits are finite, and no NaN elsewhere.
    """
    value, graph = value_of(found.node), gm.graph
    if value.dtype != torch.float32:
        return f"the sum is made in {value.dtype}; widen the logits before it"
    with graph.inserting_before(found.node):
        like: dict[str, Any] = {"dtype": torch.float32, "device": value.device}
        factor = found.factor
        if isinstance(value_of(factor), torch.Tensor):
            flat = insert(graph, torch.reshape, (factor, (1,)))
            weights = insert(graph, torch.Tensor.to, (flat, torch.float32))
        else:
            known = 1.0 if factor is None else float_of(factor)
            weights = _constant(graph, found.node, (1,), known, like)
        beta = _constant(graph, found.node, (), 1.0, like)
        sides = (found.base, list(found.tuned), list(found.reference))
        target = torch.ops.graphopt.combine_logits.default
        node = insert(graph, target, (*sides, weights, beta))
    node.meta = {**found.node.meta, **node.meta}
    found.node.replace_all_uses_with(node)
    graph.erase_node(found.node)
    return Combination(node, found.base, found.tuned, found.reference)


def _constant(
    graph: fx.Graph, like: fx.Node, shape: Any, value: Any, kind: dict[str, Any]
) -> fx.Node:
    """Insert a tensor of one value; its fake mode is that of ``like``."""
    node = graph.call_function(torch.full, (shape, value), kind)
    mode: Any = value_of(like).fake_mode
    with mode:
        node.meta["example_value"] = torch.full(shape, value, **kind)
    return node


def fuse(gm: fx.GraphModule, found: Combination) -> str:
    """Fuse the combination with the choice of a token behind it; say why where not."""
    users = list(found.node.users)
    if len(users) != 1 or op_name(found.node) != COMBINED:
        return "several calls read the combined logits"
    user = users[0]
    more = _sampling(user, found)
    if more is None:
        return f"{op_name(user)} reads the combined logits"
    if any(len(shape_of(logits) or ()) != 2 for logits in found.logits):
        return "the logits are not [B, V]"
    with gm.graph.inserting_before(user):
        target = torch.ops.graphopt.combine_sample.default
        node = insert(gm.graph, target, (*found.node.args, *more))
    if node.meta["example_value"].shape != value_of(user).shape:
        gm.graph.erase_node(node)
        return f"{op_name(user)} keeps a dimension"
    node.meta = {**user.meta, **node.meta}
    user.replace_all_uses_with(node)
    for old in (user, found.node):
        gm.graph.erase_node(old)
    return ""


def _sampling(user: fx.Node, found: Combination) -> tuple[Any, ...] | None:
    """Return (uniform, temperature, top_p, of_base) of a choice of a token."""
    if op_name(user) == "argmax":
        ends = argument(user, 1, "dim") in (-1, 1)
        return (None, None, None, False) if ends else None
    if op_name(user) != SAMPLED or user.args[0] is not found.node:
        return None
    large = argument(user, 4, "large")
    if large is not None and large is not found.base:
        return None
    scalars = (argument(user, i, n) for i, n in enumerate(_SCALARS, 1))
    return (*scalars, large is not None)


_SCALARS = ("uniform", "temperature", "top_p")
