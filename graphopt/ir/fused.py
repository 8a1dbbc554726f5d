"""Attention that one operator computes: SDPA, or graphopt's own."""

from __future__ import annotations

from dataclasses import replace

from torch import fx

from graphopt.ir.attention import AttentionSite, checked, with_mask
from graphopt.ir.index_expr import Evaluator
from graphopt.ir.match import argument, float_of, shape_of, size_expr
from graphopt.ir.repeats import undo_repeats


def match_sdpa(node: fx.Node, evaluator: Evaluator) -> AttentionSite | None:
    """Return the site of an SDPA node; None unless it has [B, H, S, D] tensors."""
    query, key, value = (
        argument(node, i, n) for i, n in enumerate(("query", "key", "value"))
    )
    if any(len(shape_of(t) or ()) != 4 for t in (query, key, value)):
        return None
    if not all(isinstance((shape_of(t) or ())[1], int) for t in (query, key, value)):
        return None
    key, value, repeated = undo_repeats(query, key, value)
    mask = argument(node, 3, "attn_mask")
    site = AttentionSite(0, node, query, key, value, "sdpa", repeats_heads=repeated)
    site = replace(site, mask=mask, scale=node.kwargs.get("scale"))
    if float_of(argument(node, 4, "dropout_p", 0.0)) != 0.0:
        return replace(site, unsupported="dropout")
    causal = argument(node, 5, "is_causal", False)
    if not isinstance(causal, bool):
        return replace(site, unsupported="causal for some calls only")
    if causal:
        return checked(replace(site, pattern="causal"))
    return checked(with_mask(site, mask, evaluator))


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
