"""Modules in a captured graph: at an attention site, or beside its operators."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx, nn

from graphopt.errors import PassError
from graphopt.ir.attention.site import AttentionSite
from graphopt.ir.match import float_of, op_name
from graphopt.ir.model_graph import ModelGraph

OPS = ("graphopt.attention", "graphopt.visit_attention")


class Watch(nn.Module):
    """Hands every call of an operator to ``see(name, arguments)``."""

    def __init__(self, name: str, see: Callable[[str, tuple[Any, ...]], None]) -> None:
        super().__init__()
        self.name, self.see = name, see

    def forward(self, *arguments: Any) -> None:
        """Look at the arguments; there is no result."""
        self.see(self.name, arguments)


def watch_ops(gm: fx.GraphModule, see: Callable[[str, tuple[Any, ...]], None]) -> None:
    """Let ``see`` look at the arguments of graphopt's attention operators."""
    nodes = [n for n in gm.graph.nodes if op_name(n) in OPS]
    for index, node in enumerate(nodes):
        gm.add_submodule(f"watch_{index}", Watch(op_name(node), see))
        with gm.graph.inserting_before(node):
            gm.graph.call_module(f"watch_{index}", node.args, dict(node.kwargs))


def causal_sites(gm: fx.GraphModule) -> list[AttentionSite]:
    """Return the sites of a prefill, all of them plain causal.

    Raises PassError for a model with any other site: its heads have no patterns.
    """
    sites = ModelGraph(gm).attention
    if not sites:
        raise PassError("no attention was found in the model's graph")
    for site in sites:
        reason = site.unsupported
        if reason is None and site.pattern != "causal":
            reason = f"its mask is '{site.pattern}'"
        if reason is None and site.key_mask is not None:
            reason = "it hides padding; give one prompt without an attention mask"
        if reason is not None:
            raise PassError(f"attention[{site.index}] is not plain causal: {reason}")
    return sites


def scale_of(site: AttentionSite) -> float | None:
    """Return the number by which a site multiplies scores; None is 1/sqrt(D).

    Raises PassError where the graph computes it.
    """
    scale = float_of(site.scale)
    if scale is None and site.scale is not None:
        raise PassError(f"attention[{site.index}] computes its scale in the graph")
    return scale


def replace_by_lists(
    gm: fx.GraphModule, site: AttentionSite, select: nn.Module
) -> None:
    """Let ``site`` attend to the `VisitList` that ``select(query, key)`` returns."""
    graph, name = gm.graph, f"select_{site.index}"
    gm.add_submodule(name, select)
    rest = ([0], 0, scale_of(site), site.softcap, 0)
    with graph.inserting_before(site.node):
        lists = graph.call_module(name, (site.query, site.key))
        parts = [graph.call_function(operator.getitem, (lists, i)) for i in range(4)]
        args = (site.query, site.key, site.value, None, *parts, *rest)
        node = graph.call_function(torch.ops.graphopt.visit_attention.default, args)
    node.meta = dict(site.node.meta)
    site.node.replace_all_uses_with(node)
    graph.erase_node(site.node)


def tap_site(
    gm: fx.GraphModule,
    site: AttentionSite,
    tap: Callable[[int, torch.Tensor, torch.Tensor, torch.Tensor], None],
) -> None:
    """Let ``tap(index, query, key, value)`` look at a site's tensors as it runs."""
    name = f"tap_{site.index}"
    gm.add_submodule(name, Watch(str(site.index), lambda n, a: tap(int(n), *a)))
    with gm.graph.inserting_before(site.node):
        gm.graph.call_module(name, (site.query, site.key, site.value))
