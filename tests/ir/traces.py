"""Traces of tiny models as raise sees them, and gathers as token dropping has them."""

from __future__ import annotations

import operator
from functools import cache
from typing import Any

import torch
from torch import fx

from graphopt import _compat
from graphopt.ir.constants import fold_float_attributes
from graphopt.ir.dce import eliminate_dead_code
from graphopt.ir.match import op_name, shape_of, size_expr, sizes_of, value_of
from graphopt.ir.model_graph import ModelGraph
from tests.models import TINY, capture, copy_graph, padding_mask, prefilled, token_ids

PAST = 7


def inputs_of(model: Any, tokens: int, kind: str) -> dict[str, Any]:
    """Two rows of ``tokens`` tokens: plain, padded, or with a past and padded."""
    inputs: dict[str, Any] = {"input_ids": token_ids(2, tokens)}
    total = tokens + PAST * (kind == "past")
    if kind != "plain":
        inputs["attention_mask"] = padding_mask([total, total - 3], total)
    if kind == "past":
        inputs["past_key_values"] = prefilled(model, token_ids(2, PAST))
    return inputs


@cache
def _trace(name: str, tokens: int, kind: str, dynamic: bool) -> fx.GraphModule:
    model = TINY[name]().double() if kind != "plain" else TINY[name]()
    (gm,) = capture(model, dynamic=dynamic, **inputs_of(model, tokens, kind))
    fold_float_attributes(gm)
    eliminate_dead_code(gm)
    return gm


def trace(
    name: str, tokens: int, kind: str = "plain", dynamic: bool = False
) -> ModelGraph:
    """A view of a copy of the graph: it may be edited."""
    return ModelGraph(copy_graph(_trace(name, tokens, kind, dynamic)))


def residual_after(view: ModelGraph, layer: int) -> fx.Node:
    """The residual stream between two layers: what both the norm and the sum read."""
    order = list(view.gm.graph.nodes)
    start, end = (order.index(view.attention[layer + i].node) for i in (0, 1))
    stream = sizes_of(view.norms[0].output)
    found = [
        node
        for node in order[start:end]
        if sizes_of(node) == stream
        and op_name(node) not in ("linear", "to")
        and len(node.users) > 1
    ]
    return found[-1]


class Gathers:
    """Gathers after a layer: every ``step``-th token, in order."""

    def __init__(self, view: ModelGraph, layer: int = 0, step: int = 2) -> None:
        self.view = view
        self.graph = view.gm.graph
        self.mode = _compat.fake_mode_of(view.gm)
        self.stream = residual_after(view, layer)
        self.step = step
        self.crossing = self._crossing()
        self.new: dict[fx.Node, fx.Node] = {}
        _ = view.symbols  # before nodes of T' go in
        with self.graph.inserting_before(self.stream.next):
            self._insert()

    def _crossing(self) -> list[fx.Node]:
        """What later layers read of earlier nodes and that has tokens."""
        order = list(self.graph.nodes)
        cut = order.index(self.stream)
        later = {node for node in order[cut + 1 :] if node.op != "output"}
        tokens = size_expr(self.view.tokens)
        return [
            node
            for node in order[: cut + 1]
            if later & set(node.users) and tokens in sizes_of(node)
        ]

    def _insert(self) -> None:
        tokens = self.size(self.stream, 1)
        self.kept = self.call(torch.arange, 0, tokens, self.step)
        for node in self.crossing:
            self.new[node] = self._gathered(node, tokens)

    def _gathered(self, node: fx.Node, tokens: Any) -> fx.Node:
        """Queries are on the axis of T; a mask has the keys on its last axis."""
        axis = sizes_of(node).index(size_expr(self.view.tokens))
        result = self.call(torch.index_select, node, axis, self.kept)
        if len(sizes_of(node)) == 4 and sizes_of(node)[1] == 1 and axis == 2:
            result = self.call(torch.index_select, result, 3, self._keys(node, tokens))
        return result

    def _keys(self, mask: fx.Node, tokens: Any) -> fx.Node:
        past = self.call(operator.sub, self.size(mask, 3), tokens)
        kept = self.call(operator.add, self.kept, past)
        return self.call(torch.cat, [self.call(torch.arange, past), kept])

    def size(self, node: fx.Node, axis: int) -> Any:
        size = (shape_of(node) or ())[axis]
        if isinstance(size, int):
            return size
        return self.call(torch.ops.aten.sym_size.int, node, axis)

    def call(self, target: Any, *args: Any) -> fx.Node:
        node = self.graph.call_function(target, args)
        with self.mode:
            node.meta["example_value"] = target(*fx.map_arg(args, value_of))
        return node


def sizes_with_values(gm: fx.GraphModule) -> list[Any]:
    """All that an edit may change: nodes, their arguments and their sizes."""
    return [(n.name, n.args, n.kwargs, str(sizes_of(n))) for n in gm.graph.nodes]
