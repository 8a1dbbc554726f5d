"""The predicted FLOPs of a prefill by layer: products with weights, and attention."""

from __future__ import annotations

from bisect import bisect_left
from math import prod
from typing import Any

from torch import fx

from graphopt.cli.site_cost import site_figures
from graphopt.ir.attention.site import AttentionSite, find_attention
from graphopt.ir.match import shape_of, size_expr, sizes_of
from graphopt.ir.model_graph import ModelGraph
from graphopt.ir.sites.linear import LinearSite

# Rows that no layer has: what is before the first and behind the last.
ENDS = "ends"


class SizesAt:
    """Numbers for the sizes of a graph, when its prompt has ``tokens`` tokens.

    ``model`` is the graph before the passes: sizes after them are over its symbol.
    """

    def __init__(self, model: ModelGraph, tokens: int) -> None:
        self.tokens = tokens
        self._symbol = model.token_symbol

    def of(self, size: Any) -> int:
        """Return an int, SymInt or expression as a number.

        A size over other symbols, such as a second stack's, counts as all the tokens.
        """
        expr = size if hasattr(size, "subs") else size_expr(size)
        known = expr if self._symbol is None else expr.subs(self._symbol, self.tokens)
        return int(known) if known.is_Integer else self.tokens


def layer_costs(model: ModelGraph, at: SizesAt) -> list[dict[str, Any]]:
    """Return a row a layer: the tokens that live there and its GFLOP, batch 1.

    The last row is that of the ends, an encoder of images among them. Where layers
    cannot be told apart one row holds the whole graph. Experts behind routing are not
    counted: which run is data.
    """
    alive = {site.index: at.of(site.query_len) for site in model.attention}
    layer_of = _Layers(model)
    totals: dict[Any, float] = dict.fromkeys(layer_of.names, 0.0)
    known = {site.node: site.index for site in model.attention}
    for site in find_attention(model.gm):
        index = known.get(site.node)
        name = layer_of.names[-1] if index is None else layer_of.known(index)
        totals[name] += _attention(site, at)
    for linear in model.linears:
        totals[layer_of(linear.node)] += _linear(linear, at) / 1e9
    return [
        {"layer": name, "tokens": alive.get(name), "gflop": flops}
        for name, flops in totals.items()
    ]


class _Layers:
    """The layer that a node belongs to: streams end one where the next begins."""

    def __init__(self, model: ModelGraph) -> None:
        self._order = {node: i for i, node in enumerate(model.gm.graph.nodes)}
        layers = model.layers
        ends = [self._order[x.output] for x in layers if x.output is not None]
        self._ends = ends if len(ends) == len(layers) else []
        first = layers[0].input if layers else None
        self._start = self._order[first] if first is not None else 0
        self.names: list[Any] = [layer.index for layer in layers] if self._ends else []
        self.names.append(ENDS if self._ends else "all")

    def __call__(self, node: fx.Node) -> Any:
        place = self._order[node]
        if place < self._start:
            return self.names[-1]
        return self.names[bisect_left(self._ends, place)]

    def known(self, layer: int) -> Any:
        """Return the name of a layer's row."""
        return layer if self._ends else self.names[-1]


def _attention(site: AttentionSite, at: SizesAt) -> float:
    return float(site_figures(site, at.of(site.query_len))["gflop"])


def _linear(site: LinearSite, at: SizesAt) -> float:
    """Two FLOPs an element of the input and row of the weight."""
    elements = prod(at.of(size) for size in sizes_of(site.input))
    width = (shape_of(site.node) or (0,))[-1]
    return 2.0 * elements * at.of(width)
