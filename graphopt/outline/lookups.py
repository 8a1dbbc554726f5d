"""Operators that only look up what is kept, called as they are before all pieces.

A compiled piece that passes on hundreds of tensors takes several times as long as the
call that gives them.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import fx

from graphopt.ops.int8 import coded_weights

_FUNCTIONS: dict[object, Callable[..., Sequence[Any]]] = {
    torch.ops.graphopt.coded_weights.default: coded_weights
}


@dataclass(frozen=True)
class Lookup:
    """A call whose arguments are inputs of the graph, and the items of its result."""

    node: fx.Node
    items: dict[int, fx.Node]

    @property
    def function(self) -> Callable[..., Sequence[Any]]:
        """Return what to call in the place of the operator."""
        return _FUNCTIONS[self.node.target]

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        """Return the nodes that the call stands for."""
        return (self.node, *self.items.values())

    def targets(self) -> str:
        """Return the names that the results get, as the left side of an assignment."""
        names = {index: node.name for index, node in self.items.items()}
        count = len(self.node.meta["example_value"])
        return "".join(f"{names.get(index, '_')}, " for index in range(count))


def find_lookups(nodes: Sequence[fx.Node]) -> list[Lookup]:
    """Return the calls among ``nodes`` that can be made before everything else."""
    found = []
    for node in nodes:
        reads = node.all_input_nodes
        if node.target in _FUNCTIONS and all(n.op == "placeholder" for n in reads):
            items = {cast("int", user.args[1]): user for user in node.users}
            if all(user.target is operator.getitem for user in node.users) and items:
                found.append(Lookup(node, items))
    return found
