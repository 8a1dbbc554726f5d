"""The nodes that compute with gathered tensors, from the point of the gather on."""

from __future__ import annotations

from collections.abc import Mapping

from torch import fx

from graphopt.ir.match import op_name

# These give the same elements at every size (an expand repeats them: the axis of 1 that
# it needs, in a tensor without tokens, is left to the equations), or are sizes.
_UNIFORM = {"zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full"}
_UNIFORM |= {"expand", "Size"}


def later_nodes(
    graph: fx.Graph, gathered: Mapping[fx.Node, fx.Node]
) -> tuple[list[fx.Node], fx.Node]:
    """Rewire ``graph`` to the gathered tensors; return who computes with them.

    Returns the later nodes in graph order, and the node before which their point is.
    """
    order = list(graph.nodes)
    place = {node: i for i, node in enumerate(order)}
    cut = max(place[new] for new in gathered.values())
    for old, new in gathered.items():
        for user in list(old.users):
            if place[user] > cut and user.op != "output":
                user.replace_input_with(old, new)
    after = [node for node in order[cut + 1 :] if node.op != "output"]
    reached = set(gathered.values())
    for node in after:
        if any(source in reached for source in node.all_input_nodes):
            reached.add(node)
    reached |= {node for node in after if _is_made_for(node, reached)}
    return [node for node in after if node in reached], order[cut + 1]


def _is_made_for(node: fx.Node, reached: set[fx.Node]) -> bool:
    """Tell whether ``node`` makes a tensor from sizes, for nodes in ``reached`` only.

    It may get another size when its elements do not tell of positions among all tokens:
    zeros and the like, and an arange that is written through an index, which numbers
    the rows at hand (the inverse of a permutation, in a mixture of experts).
    """
    users = list(node.users)
    if not users or any(user not in reached for user in users):
        return False
    if op_name(node) in _UNIFORM:
        return True
    return op_name(node) == "arange" and all(
        op_name(user) == "setitem" and user.args[2] is node and user.args[1] in reached
        for user in users
    )
