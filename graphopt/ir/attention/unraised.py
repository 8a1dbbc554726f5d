"""What looks like attention and was not raised, and why."""

from __future__ import annotations

from collections.abc import Collection

from torch import fx

from graphopt.ir.attention.eager import why_not
from graphopt.ir.match import op_name, shape_of
from graphopt.ir.sites.linear import is_linear

_CASTS = ("to", "float", "contiguous", "type_as", "reshape", "getitem")
# Attention that is one operator, in spellings that no rule reads.
_OTHER = ("flex_attention", "multi_head_attention_forward", "flash_attn", "varlen_attn")


def unraised(graph: fx.Graph, sites: Collection[fx.Node]) -> dict[fx.Node, str]:
    """Return every attention-like node outside ``sites``, and the reason."""
    reasons = {node: _reason(node, sites) for node in graph.nodes}
    return {node: reason for node, reason in reasons.items() if reason}


def _reason(node: fx.Node, sites: Collection[fx.Node]) -> str:
    name = op_name(node)
    if name == "sdpa" and node not in sites:
        return f"attention over tensors of sizes {_sizes(node)}"
    if any(part in name for part in _OTHER):
        return f"attention by {name}"
    if name != "softmax" or _feeds(node, sites) or _chooses_experts(node):
        return ""
    return f"a softmax in no known attention: {why_not(node)}"


def _sizes(node: fx.Node) -> str:
    return ", ".join(str(list(shape_of(n) or ())) for n in node.all_input_nodes[:3])


def _chooses_experts(softmax: fx.Node) -> bool:
    """A router's scores are one linear; those of attention are a product of two."""
    node = softmax.args[0] if softmax.args else None
    while isinstance(node, fx.Node) and op_name(node) in (*_CASTS, "topk"):
        node = node.args[0]
    return isinstance(node, fx.Node) and is_linear(node)


def _feeds(softmax: fx.Node, sites: Collection[fx.Node]) -> bool:
    """Tell whether ``softmax`` is inside an eager attention that was found."""
    node = softmax
    for _ in range(8):
        if node in sites:
            return True
        users = list(node.users)
        if not users:
            return False
        node = users[0]
    return False
