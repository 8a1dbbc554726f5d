"""A prompt's dense FFN counts its neurons and fills the buffers of the chosen ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphopt.codegen.neurons import PARTS
from graphopt.ir.attention.site import AttentionSite
from graphopt.ir.match import same_size, sizes_of, value_of
from graphopt.ir.model_graph import ModelGraph
from graphopt.ir.replace import call, key_mask_of
from graphopt.ir.sites.ffn import FfnSite
from graphopt.ir.sites.linear import operands
from graphopt.ir.sizes.build import size_argument
from graphopt.passes.ffn.held import Held
from graphopt.passes.ffn.options import NeuronOptions

_ops = torch.ops.graphopt


def count_and_gather(model: ModelGraph, held: Held, options: NeuronOptions) -> None:
    """Insert the count of the FFN's neurons, the choice and the gathers."""
    graph, site = model.gm.graph, held.layer.ffn[0]
    inner: Any = operands(site.down)[0]
    with graph.inserting_before(site.down):
        mask = new_tokens_mask(graph, held.layer.attention)
        parts = max(1, round(options.token_ratio * PARTS))
        how = (parts, options.criterion == "abs", held.weight, held.phase == "new")
        call(graph, _ops.count_neurons.default, (inner, mask, held.counts, *how))
        if held.shares is None:
            call(graph, _ops.choose_neurons.default, (held.counts, held.indices))
        else:
            args = (held.counts, held.shares, held.indices)
            call(graph, _ops.nearest_neurons.default, args)
        _gather(graph, held, site)
    graph.erase_node(held.node)


def _gather(graph: fx.Graph, held: Held, site: FfnSite) -> None:
    for projection in held.projections(site):
        if projection.scales is not None:
            buffers: Any = (projection.buffer, projection.scales)
            how = (projection.dim, projection.fused, projection.transposed)
            args = (projection.weight, held.indices, *buffers, *how)
            call(graph, _ops.gather_codes.default, args)
        for weight, buffer, dim in projection.buffers:
            args = (weight, held.indices, buffer, dim, projection.fused)
            call(graph, _ops.gather_neurons.default, args)


def new_tokens_mask(graph: fx.Graph, site: AttentionSite) -> fx.Node | None:
    """Return which of a call's tokens are real, bool [B, S]; None where all are."""
    mask = key_mask_of(graph, site)
    if mask is None:
        return None
    new, seen = (sizes_of(node)[2] for node in (site.query, site.key))
    if same_size(new, seen) or same_size(sizes_of(mask)[1], new):
        return mask
    sources = [mask, site.query]
    start = size_argument(graph, sizes_of(mask)[1] - new, sources)
    length = size_argument(graph, new, sources)
    node = graph.call_method("narrow", (mask, 1, start, length))
    values = (value_of(start), value_of(length))
    node.meta["example_value"] = value_of(mask).narrow(1, *values)
    return node


__all__ = ["count_and_gather", "new_tokens_mask"]
