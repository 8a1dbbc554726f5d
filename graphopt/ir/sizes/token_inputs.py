"""Which axes of a graph's inputs are tokens, in a graph traced with fixed sizes."""

from __future__ import annotations

import torch
from torch import fx

from graphopt import _compat
from graphopt.ir.constants import is_parameter
from graphopt.ir.match import argument, op_name, value_of
from graphopt.ir.sizes.slots import TOKENS, LiteralReadings, Reading


class TokenInputs:
    """The tensor inputs of ``gm``, sorted into parameters, caches and the rest.

    ``anchor`` is the input with the token ids [B, T] or embeddings [B, T, H], or None;
    ``cached`` are the lengths of the caches that the graph appends to.
    """

    def __init__(self, gm: fx.GraphModule, tokens: int) -> None:
        self.tokens = tokens
        tensors = [
            node
            for node in gm.graph.find_nodes(op="placeholder")
            if isinstance(value_of(node), torch.Tensor)
        ]
        self.fixed = {node for node in tensors if is_parameter(node)}
        caches = {n: c for n in tensors if (c := _cached_length(n)) is not None}
        self.fixed |= set(caches)
        self.cached = sorted(set(caches.values()))
        free = [node for node in tensors if node not in self.fixed]
        self.anchor = self._anchor(free)

    def _anchor(self, free: list[fx.Node]) -> fx.Node | None:
        """Ids come first: with them in the graph, nothing else names the tokens."""
        ids = [
            n for n in free if self._is_row(n) and value_of(n).shape[1] == self.tokens
        ]
        named = [n for n in ids if "input_ids" in _compat.placeholder_source(n)]
        embeddings = [n for n in free if self._is_embedding(n)]
        return next(iter([*named, *ids, *embeddings]), None)

    def _is_row(self, node: fx.Node) -> bool:
        value = value_of(node)
        return value.dim() == 2 and not value.is_floating_point()

    def _is_embedding(self, node: fx.Node) -> bool:
        value = value_of(node)
        return (
            value.dim() == 3
            and value.is_floating_point()
            and value.shape[1] == self.tokens
        )

    def readings(
        self, node: fx.Node, literals: LiteralReadings
    ) -> list[tuple[Reading, ...]]:
        """Return the readings of each size of ``node``.

        The last axis of [batch, tokens] inputs (ids, positions, padding masks) counts
        tokens, with those of the cache for a padding mask: this is what such inputs
        are. Parameters and caches have numbers. Other inputs are left to the equations.
        """
        shape = value_of(node).shape
        numbers = [literals.of(int(size))[:1] for size in shape]
        if node in self.fixed:
            return numbers
        if self._is_row(node):
            return [numbers[0], self._counted(int(shape[1]), literals)]
        if node is self.anchor:
            return [numbers[0], self._counted(int(shape[1]), literals), numbers[2]]
        return [literals.of(int(size)) for size in shape]

    def _counted(self, size: int, literals: LiteralReadings) -> tuple[Reading, ...]:
        past = size - self.tokens
        if past == 0 or past in self.cached:
            wanted = TOKENS + past
            return tuple(r for r in literals.of(size) if r.expr == wanted)
        return literals.of(size)


def _cached_length(node: fx.Node) -> int | None:
    """Return the length of an input to which the graph appends, or None.

    A cache is as long as it is, however many tokens are appended to it.
    """
    for user in node.users:
        if op_name(user) != "cat" or value_of(node).dim() != 4:
            continue
        dim = argument(user, 1, "dim", 0)
        return int(value_of(node).shape[dim]) if isinstance(dim, int) else None
    return None
