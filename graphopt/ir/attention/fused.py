"""Attention that one operator computes: SDPA, or graphopt's own."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import fx

from graphopt.ir.attention.repeats import undo_repeats
from graphopt.ir.attention.site import AttentionSite, checked, unwritten, with_mask
from graphopt.ir.masks.index_expr import Evaluator
from graphopt.ir.match import argument, float_of, shape_of, size_expr, sizes_of


def match_sdpa(node: fx.Node, evaluator: Evaluator) -> AttentionSite | None:
    """Return the site of an SDPA node; None unless it has [B, H, S, D] tensors."""
    query, key, value = (
        argument(node, i, n) for i, n in enumerate(("query", "key", "value"))
    )
    if any(len(shape_of(t) or ()) != 4 for t in (query, key, value)):
        return None
    if not all(sizes_of(t)[1].is_Integer for t in (query, key, value)):
        return None
    copies = key, value
    key, value, repeated = undo_repeats(query, key, value)
    mask = argument(node, 3, "attn_mask")
    site = AttentionSite(0, node, query, key, value, "sdpa", repeats_heads=repeated)
    site = replace(site, mask=mask, scale=node.kwargs.get("scale"))
    if float_of(argument(node, 4, "dropout_p", 0.0)) != 0.0:
        return replace(site, unsupported="dropout")
    causal = argument(node, 5, "is_causal", False)
    if not isinstance(causal, bool):
        return replace(site, unsupported="causal for some calls only")
    site = replace(site, pattern="causal") if causal else site
    reads = list(zip((key, value), copies, strict=True)) if repeated else []
    return unwritten(checked(with_mask(site, mask, evaluator)), evaluator, reads)


def match_op(node: fx.Node) -> AttentionSite:
    """Return the site of a ``graphopt::attention`` node."""
    names = ("query", "key", "value", "key_mask", "pattern", "sink", "window")
    query, key, value, key_mask, pattern, _, window = (
        argument(node, i, name) for i, name in enumerate(names)
    )
    offset = size_expr(argument(node, 7, "query_offset"))
    site = AttentionSite(0, node, query, key, value, "op", pattern, max(window), offset)
    return replace(
        site,
        key_mask=key_mask,
        scale=argument(node, 8, "scale"),
        softcap=float_of(argument(node, 9, "softcap", 0.0)) or 0.0,
    )


def match_visit(node: fx.Node) -> AttentionSite:
    """Return the site of a ``graphopt::visit_attention`` node; its lists are data."""
    query, key, value, key_mask = (argument(node, i, "") for i in range(4))
    offset = size_expr(argument(node, 9, "query_offset"))
    site = AttentionSite(0, node, query, key, value, "op", "visit-list", 0, offset)
    return replace(
        site,
        key_mask=key_mask,
        scale=argument(node, 10, "scale"),
        softcap=float_of(argument(node, 11, "softcap", 0.0)) or 0.0,
    )


def visit_tables(site: AttentionSite) -> list[tuple[Any, ...]]:
    """Return (sink, window, vertical, slash, blocks, stride, threshold) of each head.

    ``site`` is of the pattern visit-list; the last three are 0 without a block list.
    """
    lists: Any = argument(site.node, 4, "runs")
    tables = [list(argument(lists.args[0], i, "")) for i in range(3, 7)]
    blocks: Any = argument(site.node, 13, "key_blocks")
    if blocks is None:
        tables += [[0]] * 3
    else:
        tables += [list(argument(blocks.args[0], i, "")) for i in range(3, 6)]
    return list(
        zip(*((t * site.num_heads)[: site.num_heads] for t in tables), strict=True)
    )
