"""Carry marks of patches the way their features go, to the tokens of the prompt."""

from __future__ import annotations

import torch
from torch import fx

from graphopt.errors import PassError
from graphopt.ir.match import op_name, shape_of, value_of
from graphopt.ir.vision.insert import inferred, insert
from graphopt.ir.vision.span import VisionWrite

# Operators that move vectors and leave them as they are.
_MOVING = {"getitem", "select", "slice", "narrow", "split", "chunk", "unbind", "cat"}
_MOVING |= {"stack", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "to"}
_MOVING |= {"contiguous", "clone", "permute", "transpose", "expand", "type_as", "float"}


def projected_patches(write: VisionWrite) -> fx.Node:
    """Return the last computed value [N, P, H] that the features are moved from.

    PassError where vectors of several such values are written.
    """
    sources = {n for n in _moves(write.features) if op_name(n) not in _MOVING}
    computed = [n for n in sources if n.op.startswith("call") and shape_of(n)]
    if len(computed) != 1:
        raise PassError("the features come from several computations")
    return computed[0]


def carry_marks(
    graph: fx.Graph, write: VisionWrite, projected: fx.Node, marks: fx.Node
) -> fx.Node:
    """Insert the marks [N, P] of patches as marks of tokens, bool [B, S].

    ``projected`` [N, P, H] is where the features come from. All that moves them from
    there moves the marks, spread over the channels; what is put between them (new
    lines of a grid) is unmarked.
    """
    wide = insert(graph, "unsqueeze", marks, -1)
    spread = insert(graph, "expand_as", wide, projected)
    dtype = value_of(projected).dtype
    copies = {projected: insert(graph, "to", spread, dtype)}
    moves = _moves(write.features)
    for node in list(graph.nodes):
        if node in moves and node not in copies:
            copies[node] = _moved(graph, node, copies)
    first = insert(graph, "select", copies[write.features], -1, 0)
    places = insert(graph, "select", write.mask, -1, 0)
    none = insert(graph, torch.zeros_like, places, dtype=value_of(first).dtype)
    written = insert(graph, "masked_scatter", none, places, first)
    return insert(graph, "ne", written, 0)


def _moves(features: fx.Node) -> set[fx.Node]:
    """Return the features and what they are moved from, up to what computed it."""
    found, pending = {features}, [features]
    while pending:
        node = pending.pop()
        if op_name(node) in _MOVING:
            fresh = [n for n in node.all_input_nodes if n not in found]
            found.update(fresh)
            pending += fresh
    return found


def _moved(graph: fx.Graph, node: fx.Node, copies: dict[fx.Node, fx.Node]) -> fx.Node:
    if op_name(node) in _MOVING and any(n in copies for n in node.all_input_nodes):
        return inferred(graph.node_copy(node, lambda n: copies.get(n, n)))
    if isinstance(value_of(node), torch.Tensor):
        return insert(graph, torch.zeros_like, node)
    return node  # a size
