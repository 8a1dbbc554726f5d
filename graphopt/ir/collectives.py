"""Collectives in a graph: counted, made functional, and added for what ranks share out.

Under tensor parallelism each rank has some heads and neurons, and what comes out of
attention and FFN is summed over the ranks of a group. What a pass sums or ranks over
heads or neurons has to be summed over the same group; it is found in the graph.
"""

from __future__ import annotations

from collections.abc import Container
from typing import Any

import torch
from torch import fx

from graphopt import _compat
from graphopt.errors import PassError
from graphopt.ir.casts import CASTS
from graphopt.ir.match import op_name
from graphopt.ir.replace import call

_COLLECTIVES = (
    "all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast",
    "redistribute",
)  # fmt: skip
_NATIVE = "_c10d_functional."
# Operators whose result may be memory of their input's: writing to one writes to both.
_VIEWS = {
    *CASTS, "reshape", "flatten", "unflatten", "transpose", "permute", "getitem",
    "expand", "squeeze", "unsqueeze", "narrow", "select", "slice", "split", "chunk",
    "contiguous", "detach", "t", "view", "movedim", "unbind", "dropout", "getattr",
}  # fmt: skip


def is_collective(node: fx.Node) -> bool:
    """Tell whether ``node`` exchanges values between ranks."""
    if node.op not in ("call_function", "call_method"):
        return False
    name = op_name(node).rsplit(".", 1)[-1]
    return any(part in name for part in _COLLECTIVES)


def count_collectives(gm: fx.GraphModule) -> int:
    """Return how many collectives ``gm`` has, those of the graphs inside it too."""
    graphs = [m.graph for m in gm.modules() if isinstance(m, fx.GraphModule)]
    return sum(is_collective(node) for graph in graphs for node in graph.nodes)


def make_functional(gm: fx.GraphModule) -> int:
    """Read the results of collectives where they are written back; return how many.

    ``x.copy_(wait(all_reduce(x)))`` is how a collective in place is traced. It becomes
    a value of its own, so that the readers of ``x`` behind it depend on it. Left as it
    is where other values may share the memory of ``x``.
    """
    done = 0
    for node in gm.graph.find_nodes(op="call_method", target="copy_"):
        target, source = node.args[:2]
        if op_name(source) != f"{_NATIVE}wait_tensor" or not _is_own(target, source):
            continue
        target.replace_all_uses_with(
            source, delete_user_cb=lambda user, at=node: _is_behind(user, at)
        )
        node.replace_all_uses_with(source)
        gm.graph.erase_node(node)
        done += 1
    return done


def _is_own(target: fx.Node, result: fx.Node) -> bool:
    """Tell whether no other node has the memory of ``target`` when it is written."""
    if target.op not in ("call_function", "call_method") or op_name(target) in _VIEWS:
        return False
    reduced = result.args[0]
    return all(
        user in (reduced, result) or _is_behind(user, result) for user in target.users
    )


def _is_behind(user: fx.Node, node: fx.Node) -> bool:
    return user is not node and node < user


def summed_behind(start: fx.Node, adds: Container[fx.Node]) -> fx.Node | None:
    """Return the sum over ranks that ``start`` flows into before one of ``adds``.

    None where it flows into no collective: every rank has all of it. PassError for
    another collective, which does not tell over which ranks to sum.
    """
    pending, seen = [start], {start}
    while pending:
        node = pending.pop(0)
        if node is not start and is_collective(node):
            return _checked(node)
        for user in node.users:
            if user not in seen and user not in adds and user.op != "output":
                seen.add(user)
                pending.append(user)
    return None


def _checked(node: fx.Node) -> fx.Node:
    name = op_name(node)
    if not name.endswith("all_reduce") or (
        name.startswith(_NATIVE) and node.args[1] != "sum"
    ):
        raise PassError(f"its parts meet in {name}, which is no sum over ranks")
    return node


def sum_over_ranks(graph: fx.Graph, like: fx.Node, value: fx.Node) -> fx.Node:
    """Insert the sum of ``value`` over the group of the existing sum ``like``.

    The same operator with the same arguments, whichever engine it is of.
    """
    node = call(graph, like.target, (value, *like.args[1:]))
    if not op_name(like).startswith(_NATIVE):
        return node
    return call(graph, torch.ops._c10d_functional.wait_tensor.default, (node,))


def max_over_ranks(graph: fx.Graph, like: fx.Node, value: fx.Node) -> fx.Node:
    """Insert the greatest of the ranks' ``value``, over the group of the sum ``like``.

    PassError where its operator names none.
    """
    group_of(like)
    functional = torch.ops._c10d_functional
    node = call(graph, functional.all_reduce.default, (value, "max", like.args[-1]))
    return call(graph, functional.wait_tensor.default, (node,))


def gather_over_ranks(graph: fx.Graph, like: fx.Node, value: fx.Node) -> fx.Node:
    """Insert the ranks' parts of ``value`` one behind the other along its last axis.

    In order of rank, over the group of the existing sum ``like``. PassError where its
    operator names none.
    """
    ranks, aten = group_of(like).size(), torch.ops.aten
    whole = call(graph, aten.contiguous.default, (value,))
    gather = torch.ops._c10d_functional.all_gather_into_tensor.default
    found = call(graph, gather, (whole, ranks, like.args[-1]))
    found = call(graph, torch.ops._c10d_functional.wait_tensor.default, (found,))
    parts = call(graph, aten.unflatten.int, (found, 0, [ranks, -1]))
    across = call(graph, aten.movedim.int, (parts, 0, -2))
    return call(graph, aten.flatten.using_ints, (across, -2))


def group_of(like: fx.Node) -> Any:
    """Return the process group of a sum; PassError where its operator names none."""
    name = like.args[-1]
    if not op_name(like).startswith(_NATIVE) or not isinstance(name, str):
        raise PassError(f"{op_name(like)} does not tell which ranks it sums over")
    return _compat.process_group(name)
