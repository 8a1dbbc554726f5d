"""A prompt's dense FFN counts its neurons and fills the buffers of the chosen ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphopt.codegen.neurons import PARTS
from graphopt.ir.attention.site import AttentionSite
from graphopt.ir.collectives import gather_over_ranks, max_over_ranks
from graphopt.ir.match import same_size, sizes_of, value_of
from graphopt.ir.model_graph import ModelGraph
from graphopt.ir.replace import call, key_mask_of
from graphopt.ir.sites.ffn import FfnSite
from graphopt.ir.sites.linear import operands
from graphopt.ir.sizes.build import size_argument
from graphopt.passes.ffn.held import Held
from graphopt.passes.ffn.options import NeuronOptions
from graphopt.passes.ffn.projection import Projection

_ops = torch.ops.graphopt


def count_and_gather(model: ModelGraph, held: Held, options: NeuronOptions) -> None:
    """Insert the count of the FFN's neurons, the choice and the gathers.

    Which neurons are a token's own, and which the prompt's, is known from all of them:
    where ranks share them out, activations are gathered, and every rank counts and
    chooses the same. Sums over ranks would not do it, as a token's share is cut off at
    a value that no rank knows by itself. That is as many floats a token as there are
    neurons, in a prompt and at a refresh; a step exchanges nothing more.
    """
    graph, site = model.gm.graph, held.layer.ffn[0]
    inner: Any = operands(site.down)[0]
    with graph.inserting_before(site.down):
        mask = new_tokens_mask(graph, held.layer.attention)
        if held.summed is not None:
            inner = gather_over_ranks(graph, held.summed, inner)
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
    indices = own_indices(graph, held)
    for projection in held.projections(site):
        if projection.scales is not None:
            buffers: Any = (projection.buffer, projection.scales)
            how = (projection.dim, projection.fused, projection.transposed)
            most = _range_over_ranks(graph, held, projection, indices)
            args = (projection.weight, indices, *buffers, *how, most)
            call(graph, _ops.gather_codes.default, args)
        for weight, buffer, dim in projection.buffers:
            args = (weight, indices, buffer, dim, projection.fused)
            call(graph, _ops.gather_neurons.default, args)
    if held.summed is not None:  # the last projection is down
        dim = projection.dim if projection.scales is None else 1
        args = (projection.buffer, own_number(graph, held), dim)
        call(graph, _ops.clear_behind.default, args)


def _range_over_ranks(
    graph: fx.Graph, held: Held, projection: Projection, indices: fx.Node
) -> fx.Node | None:
    """Insert what the scales of a down projection are of: its weights on all ranks.

    None where a scale is of weights that one rank has.
    """
    if held.summed is None or not projection.is_down:
        return None
    args = (projection.weight, indices, own_number(graph, held), projection.dim)
    most = call(graph, _ops.most_chosen.default, args)
    return max_over_ranks(graph, held.summed, most)


def own_indices(graph: fx.Graph, held: Held) -> fx.Node:
    """Return where this rank's of the chosen neurons are in its weights, [R, room]."""
    if held.summed is None:
        return held.indices
    part = (held.share.rank * held.own, held.own)
    return call(graph, _ops.own_neurons.default, (held.indices, *part, held.room))


def own_number(graph: fx.Graph, held: Held) -> fx.Node:
    """Insert how many of the chosen neurons are this rank's, int64 [R]."""
    part = (held.share.rank * held.own, held.own)
    return call(graph, _ops.count_own.default, (held.indices, *part))


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


__all__ = ["count_and_gather", "new_tokens_mask", "own_number"]
