"""Let the rest of a graph run on fewer tokens, from a point where a pass gathered some.

A pass that drops tokens after a layer gathers the residual stream and what goes with
it (cosines, sines, positions, masks). `substitute_tokens` then makes every later node
use the gathered tensors, and every later size that means the tokens their number.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import fx

from graphopt import _compat
from graphopt.errors import PassError
from graphopt.ir.match import value_of
from graphopt.ir.model_graph import ModelGraph
from graphopt.ir.sizes.build import size_argument
from graphopt.ir.sizes.calls import SizeConflictError
from graphopt.ir.sizes.fake_runs import apply
from graphopt.ir.sizes.literals import is_inferred
from graphopt.ir.sizes.slots import leaves, with_leaves
from graphopt.ir.tokens.kept import KeptTokens
from graphopt.ir.tokens.later_nodes import later_nodes
from graphopt.ir.tokens.later_sizes import LaterSizes


def substitute_tokens(
    model: ModelGraph,
    gathered: Mapping[fx.Node, fx.Node],
    alike: Collection[fx.Node] = (),
    infer: bool = True,
    tokenwise: bool = False,
) -> list[fx.Node]:
    """Replace tensors by their gathered ones in all later nodes; return those nodes.

    ``gathered`` maps the residual stream [B, T, H] to [B, T', H], cosines [1, T, D] to
    [1, T', D] or [B, T', D], a mask [B, 1, T, P + T] to [B, 1, T', P + T'], and so on.
    The new nodes are in the graph, with their values; what comes after the last of them
    is later. ``alike`` are later nodes that are known to get the sizes of the first
    gathered tensor: what layers give, where one token was traced and an axis of 1 may
    be any. The graph's output node keeps what it returned: outputs of earlier layers
    have all tokens. T' is an int or, in a dynamic graph, a SymInt. Without ``infer``
    later nodes keep their old values: for one that a substitution before it covers.
    ``tokenwise``: the tokens may lie in another order, so that operators which look
    from one token at another, graphopt's own apart, cannot follow.

    Sizes of earlier tensors, such as the keys of earlier layers, and of computations on
    all tokens stay. Raises PassError, with the graph as it was, where a later node
    cannot run on T' tokens or where sizes do not tell whether it should. In a static
    graph ask for ``model.symbols`` before new nodes go in: they fix token counts.
    """
    kept = KeptTokens(model, gathered)
    edit = _Edit(model.gm, kept, infer, tokenwise)
    try:
        return edit.run(gathered, alike)
    except SizeConflictError as error:
        edit.undo()
        raise PassError(
            f"{error.node.name} cannot follow to {kept.size} tokens: {error.reason} "
            f"(tried with {edit.tried} tokens)"
        ) from None
    except PassError:
        edit.undo()
        raise


class _Edit:
    """One substitution; it can be undone until it is complete."""

    def __init__(
        self, gm: fx.GraphModule, kept: KeptTokens, infer: bool, tokenwise: bool
    ) -> None:
        self.gm = gm
        self.kept = kept
        self.infer, self.tokenwise = infer, tokenwise
        self._before = {
            node: (node.args, node.kwargs, value_of(node)) for node in gm.graph.nodes
        }
        self._sizes: dict[Any, Any] = {}
        self._point: Any = None
        self.tried = 0

    def run(
        self, gathered: Mapping[fx.Node, fx.Node], alike: Collection[fx.Node]
    ) -> list[fx.Node]:
        later, self._point = later_nodes(self.gm.graph, gathered)
        sizes = LaterSizes(self.kept, later, alike, self.tokenwise)
        self.tried = sizes.counts[0]
        changes: dict[fx.Node, dict[int, Any]] = {}
        for (node, leaf), size in sizes.solve().items():
            changes.setdefault(node, {})[leaf] = size
        mode = _compat.fake_mode_of(self.gm)
        for node in later:
            self._resize(node, changes.get(node, {}))
            self._infer(node, mode)
        return later

    def undo(self) -> None:
        for node, (args, kwargs, value) in self._before.items():
            node.args, node.kwargs = args, kwargs
            if "example_value" in node.meta:
                node.meta["example_value"] = value
        for node in reversed(list(self.gm.graph.nodes)):
            if node not in self._before:
                self.gm.graph.erase_node(node)

    def _resize(self, node: fx.Node, changed: dict[int, Any]) -> None:
        if changed:
            sizes = {leaf: self._argument(expr) for leaf, expr in changed.items()}
            new = [sizes.get(place, leaf) for place, leaf in enumerate(leaves(node))]
            node.args, node.kwargs = with_leaves(node, new)

    def _infer(self, node: fx.Node, mode: Any) -> None:
        if not self.infer or not is_inferred(node):
            return
        args, kwargs = fx.map_arg((node.args, node.kwargs), value_of)
        try:
            sizes = _compat.discarding_sizes(mode)
            with sizes, _compat.trying_fakes(mode):
                node.meta["example_value"] = apply(node, args, kwargs)
        except Exception as error:
            raise PassError(f"{node.name} cannot be inferred: {error}") from error

    def _argument(self, expr: Any) -> Any:
        """Return a size over T' as an int or a node at the point of the gather."""
        if expr not in self._sizes:
            with self.gm.graph.inserting_before(self._point):
                self._sizes[expr] = self._build(expr)
        return self._sizes[expr]

    def _build(self, expr: Any) -> Any:
        kept = self.kept
        if isinstance(kept.size, int):
            return int(expr.subs(kept.symbol, kept.size))
        if not expr.has(kept.symbol):
            sources = self.gm.graph.find_nodes(op="placeholder")
            tensors = [n for n in sources if isinstance(value_of(n), torch.Tensor)]
            return size_argument(self.gm.graph, expr, tensors)
        if expr == kept.symbol:
            target: Any = torch.ops.aten.sym_size.int
            return self._node(target, (kept.source, kept.axis), kept.size)
        if not (expr.is_Add or expr.is_Mul):
            raise PassError(f"no way to compute the size {expr} of the kept tokens")
        function = operator.add if expr.is_Add else operator.mul
        total, *parts = [self._argument(part) for part in expr.args]
        for part in parts:
            value = function(value_of(total), value_of(part))
            total = self._node(function, (total, part), value)
        return total

    def _node(self, target: Any, args: tuple[Any, ...], value: Any) -> fx.Node:
        node = self.gm.graph.call_function(target, args)
        node.meta["example_value"] = value
        return node
