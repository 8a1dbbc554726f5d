"""Which tensors of a graph are written in place, seen through their views."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from graphopt.ir.match import is_mutating, value_of


class Aliases:
    """The storages that some node of ``graph`` writes to, and where.

    Fake tensors share a storage when the tensors do, so that a write through a view
    counts for its base and for every other view of it.
    """

    def __init__(self, graph: fx.Graph) -> None:
        self._order = {node: place for place, node in enumerate(graph.nodes)}
        self._writes: dict[int, list[int]] = {}
        for node in graph.nodes:
            if is_mutating(node):
                for storage in _written(node):
                    self._writes.setdefault(storage, []).append(self._order[node])

    def is_written(
        self, node: fx.Node, after: fx.Node | None = None, before: fx.Node | None = None
    ) -> bool:
        """Tell whether ``node``'s memory is written (between two nodes, if given)."""
        storage = storage_of(value_of(node))
        places = self._writes.get(storage, []) if storage is not None else []
        first = -1 if after is None else self._order[after]
        last = len(self._order) if before is None else self._order[before]
        return any(first < place < last for place in places)


def _written(node: fx.Node) -> list[int]:
    """Return the storages of all tensor arguments: which of them is written varies."""
    found = [node.args[0]] if node.args else []
    if isinstance(node.target, torch._ops.OpOverload):
        found = list(node.all_input_nodes)
    found += [node.kwargs["out"]] if "out" in node.kwargs else []
    flat: list[Any] = []
    fx.map_arg(found, flat.append)
    storages = [storage_of(value_of(item)) for item in flat]
    return [storage for storage in storages if storage is not None]


def storage_of(value: Any) -> int | None:
    """Return what tells the memory of a tensor from others'; None where it has none."""
    if not isinstance(value, torch.Tensor):
        return None
    try:
        return int(value.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # a sharded or sparse tensor
        return None
