"""Let attention of a ragged batch read the pages that its keys were written to."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphopt.ir.attention.site import AttentionSite
from graphopt.ir.caches.writes import concatenated, whole
from graphopt.ir.match import op_name
from graphopt.ir.replace import call, substitute
from graphopt.ir.tokens.drop import scale_of

_READ = slice(2, 9)  # starts, past, table, pools and scales


def ragged_writes(gm: fx.GraphModule) -> dict[fx.Node, fx.Node]:
    """Return the nodes that write keys of a ragged batch to pages, by the key."""
    return {
        node.args[0]: node
        for node in gm.graph.nodes
        if op_name(node) == "graphopt.append_ragged"
    }


def written(attended: fx.Node) -> Any:
    """Return the new keys of a layer, which others follow that nobody sees."""
    base = whole(attended)
    parts = concatenated(base)
    return parts[0] if parts else base


def read_ragged(gm: fx.GraphModule, site: AttentionSite, write: fx.Node) -> fx.Node:
    """Put attention over the pages of ``write`` in the place of ``site``.

    The pattern, which the model spelt for one row of all tokens, holds within each row
    of the batch. PassError where the scale is computed.
    """
    logits: tuple[Any, ...] = (scale_of(site), site.softcap)
    pattern = (site.pattern, [0], [site.window])
    with gm.graph.inserting_before(site.node):
        args = (site.query, *write.args[_READ], *pattern, *logits)
        node = call(gm.graph, torch.ops.graphopt.ragged_page_attention.default, args)
    return substitute(gm, site.node, node)
