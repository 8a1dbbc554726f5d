"""Take the position that is asked for before the LM head, and not behind it."""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from graphopt.ir.casts import CASTS
from graphopt.ir.logits.insert import insert, refresh
from graphopt.ir.match import op_name, shape_of
from graphopt.ir.sites.linear import is_linear, operands


def select_before_head(gm: fx.GraphModule, logits: fx.Node) -> bool:
    """Let the head that ``logits`` come from compute the positions that are used.

    The way from the linear to the selection is casts that nothing else reads. Returns
    whether the graph was changed; values stay what they were.
    """
    selection = _selection(logits)
    if selection is None:
        return False
    casts, node = [], selection.args[0]
    while isinstance(node, fx.Node) and op_name(node) in CASTS:
        casts.append(node)
        node = node.args[0]
    if not isinstance(node, fx.Node) or not is_linear(node):
        return False
    if any(len(n.users) > 1 for n in (node, *casts)):
        return False
    _move(gm.graph, selection, node, casts[::-1])
    return True


def _selection(logits: Any) -> fx.Node | None:
    """Return the node behind the head that selects positions of [B, S, V]."""
    while isinstance(logits, fx.Node) and not is_linear(logits):
        shape = shape_of(logits.args[0]) if logits.args else None
        if op_name(logits) == "getitem" and shape is not None and len(shape) == 3:
            return logits if _selects(logits.args[1]) and shape[1] != 1 else None
        if op_name(logits) not in (*CASTS, "getitem"):
            return None
        logits = logits.args[0]
    return None


def _selects(index: Any) -> bool:
    """Tell whether an index of [B, S, V] takes positions and whole rows of logits."""
    if not isinstance(index, tuple) or len(index) != 2 or index[0] != slice(None):
        return False
    return isinstance(index[1], (int, slice)) and index[1] != slice(None)


def _move(
    graph: fx.Graph, selection: fx.Node, linear: fx.Node, casts: list[fx.Node]
) -> None:
    source = operands(linear)[0]
    with graph.inserting_before(linear):
        taken = insert(graph, operator.getitem, (source, selection.args[1]))
    linear.replace_input_with(source, taken)
    for node in (linear, *casts):
        refresh(node)
    selection.replace_all_uses_with(selection.args[0])  # type: ignore[arg-type]
    graph.erase_node(selection)
