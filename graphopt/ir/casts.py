"""Changes of dtype, which matchers look through."""

from __future__ import annotations

from torch import fx

from graphopt.ir.match import op_name

CASTS = ("to", "float", "half", "bfloat16", "double", "type_as")


def skip_casts(node: fx.Node) -> fx.Node:
    """Return what ``node`` was before changes of its dtype."""
    while op_name(node) in CASTS and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node
