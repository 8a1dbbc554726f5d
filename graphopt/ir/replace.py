"""Put graphopt's own attention in the place of a site."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt import _compat
from graphopt.ir.attention.site import AttentionSite
from graphopt.ir.match import (
    float_of,
    same_size,
    shape_of,
    size_expr,
    sizes_of,
    value_of,
)
from graphopt.ir.sizes.build import size_argument
from graphopt.ops.block_kinds import head_kinds, kind_lists, list_block


def replace_site(
    gm: fx.GraphModule,
    site: AttentionSite,
    *,
    pattern: str,
    sink: Sequence[int],
    window: Sequence[int],
    min_tokens: int = 0,
) -> fx.Node:
    """Put ``graphopt::attention`` in the place of ``site`` and return its node.

    What only the old form needed (mask, repeated heads) is left without users.
    """
    with gm.graph.inserting_before(site.node):
        table = (pattern, list(sink), list(window))
        mask, *rest = shared_arguments(gm.graph, site, min_tokens)
        args = (site.query, site.key, site.value, mask, *table, *rest)
        node = call(gm.graph, torch.ops.graphopt.attention.default, args)
    return substitute(gm, site.node, node)


@dataclass(frozen=True)
class BlockTables:
    """The tables of `graphopt.ops.block_selection`, one value for all heads or each."""

    blocks: list[int]
    stride: list[int]
    threshold: list[float]


def replace_by_visit(
    gm: fx.GraphModule,
    site: AttentionSite,
    *,
    sink: Sequence[int],
    window: Sequence[int],
    vertical: Sequence[int],
    slash: Sequence[int],
    dense_rows: Sequence[int],
    blocks: BlockTables | None = None,
    min_tokens: int = 0,
) -> fx.Node:
    """Put a vertical-slash selection and attention over its lists in place of ``site``.

    The tables are those of `graphopt.ops.selection`; with ``blocks`` some heads get a
    block list beside them. Returns the attention's node.
    """
    graph = gm.graph
    tables = [list(t) for t in (sink, window, vertical, slash)]
    with graph.inserting_before(site.node):
        mask, *rest = shared_arguments(graph, site, min_tokens)
        select = torch.ops.graphopt.select_vertical_slash.default
        lists = call(graph, select, (site.query, site.key, mask, *tables, *rest))
        parts = [item(graph, lists, i) for i in range(4)]
        args = (site.query, site.key, site.value, mask, *parts, list(dense_rows), *rest)
        if blocks is not None:
            args += _block_lists(graph, site, blocks, mask, rest)
        node = call(graph, torch.ops.graphopt.visit_attention.default, args)
    return substitute(gm, site.node, node)


def _block_lists(
    graph: fx.Graph,
    site: AttentionSite,
    blocks: BlockTables,
    mask: fx.Node | None,
    rest: Sequence[Any],
) -> tuple[Any, ...]:
    """Insert the selection; return the arguments that attention takes for it."""
    tables = (blocks.blocks, blocks.stride, blocks.threshold)
    kinds = head_kinds(*tables, site.num_heads)
    block = list_block(kinds)
    select = torch.ops.graphopt.select_blocks.default
    args = (site.query, site.key, mask, *tables, block, *rest)
    lists = call(graph, select, args)
    parts = (item(graph, lists, i) for i in range(2))
    return (*parts, list(kind_lists(kinds, site.num_heads)), block)


def shared_arguments(
    graph: fx.Graph, site: AttentionSite, min_tokens: int
) -> tuple[Any, ...]:
    """Return the key mask and the last arguments, which the operators have alike."""
    offset = size_argument(graph, site.offset, [site.key, site.query])
    known = float_of(site.scale)
    scale = site.scale if known is None else known
    return key_mask_of(graph, site), offset, scale, site.softcap, min_tokens


def key_mask_of(graph: fx.Graph, site: AttentionSite) -> fx.Node | None:
    """Return the key mask of ``site``, bool [B, Skv], or None; new nodes may go in.

    A mask of one row holds for every batch row.
    """
    if site.key_mask is None:
        return None
    mask = _columns(graph, site, site.key_mask)
    batch = (shape_of(site.query) or ())[0]
    if size_expr((shape_of(mask) or ())[0]) == size_expr(batch):
        return mask
    rows = size_argument(graph, size_expr(batch), [site.query])
    node = graph.call_method("expand", (mask, rows, -1))
    node.meta["example_value"] = value_of(mask).expand(batch, -1)
    return node


def _columns(graph: fx.Graph, site: AttentionSite, mask: fx.Node) -> fx.Node:
    """A mask may be wider than the keys that a cache still holds."""
    kv_len = size_expr(site.kv_len)
    if site.key_start == 0 and same_size(sizes_of(mask)[1], kv_len):
        return mask
    sources = [site.key, site.query, mask]
    start, length = (size_argument(graph, e, sources) for e in (site.key_start, kv_len))
    node = graph.call_method("narrow", (mask, 1, start, length))
    values = (value_of(start), value_of(length))
    node.meta["example_value"] = value_of(mask).narrow(1, *values)
    return node


def call(graph: fx.Graph, target: Any, args: tuple[Any, ...]) -> fx.Node:
    """Insert a call of an operator whose first argument is a node; infer its value."""
    node = graph.call_function(target, args)
    values = fx.map_arg(args, lambda n: n.meta["example_value"])
    query: Any = values[0]
    with query.fake_mode, _compat.discarding_sizes(query.fake_mode):
        node.meta["example_value"] = target(*values)
    return node


def item(graph: fx.Graph, node: fx.Node, index: int) -> fx.Node:
    """Insert element ``index`` of an operator's several results."""
    found = graph.call_function(operator.getitem, (node, index))
    found.meta["example_value"] = value_of(node)[index]
    return found


def substitute(gm: fx.GraphModule, old: fx.Node, node: fx.Node) -> fx.Node:
    """Put ``node`` in the place of ``old``; ValueError where its value differs."""
    result, before = value_of(node), value_of(old)
    kept = {k: v for k, v in old.meta.items() if k != "example_value"}
    node.meta = {**kept, "example_value": result}
    if result.dtype != before.dtype or result.shape != before.shape:
        raise ValueError(f"{old.name}: {before.shape} would become {result.shape}")
    old.replace_all_uses_with(node)
    gm.graph.erase_node(old)
    return node
