"""Put products that skip weights in the place of dense ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import fx

from graphopt._compat import fake_mode_of
from graphopt.ir.match import op_name, value_of
from graphopt.ir.replace import call, substitute
from graphopt.ir.sites.ffn import FfnSite
from graphopt.ir.sites.linear import LinearSite, operands


@dataclass(frozen=True)
class GatedSite:
    """A gated FFN whose neurons can be left out: ``product`` = ``gate`` times ``up``.

    ``gate`` [..., F] is activated already; ``down`` multiplies the product.
    """

    product: fx.Node
    gate: fx.Node
    up: LinearSite
    down: LinearSite

    def linears(self) -> tuple[LinearSite, LinearSite]:
        """Return the linears of which weights are skipped."""
        return self.up, self.down


def gated_site(
    site: FfnSite, linears: Sequence[LinearSite]
) -> GatedSite | tuple[str, str]:
    """Return the parts of an FFN that CATS rewrites, or a code and why it cannot."""
    if site.form != "gated":
        return "unsupported", "it has no gate"
    if site.gate is site.up:
        return "unsupported", "gate and up are one projection"
    by_node = {linear.node: linear for linear in linears}
    up, down = by_node.get(site.up), by_node.get(site.down)
    if up is None or down is None or up.transposed:
        return "unsupported", "the up projection's rows do not lie in one piece each"
    if up.done or down.done:
        return "done", "another pass has rewritten its linears"
    return _followed(up, down) or (
        "cannot-follow",
        "gate, product and down projection do not follow on one another",
    )


def _followed(up: LinearSite, down: LinearSite) -> GatedSite | None:
    product = down.input
    if list(up.node.users) != [product] or op_name(product) != "mul":
        return None
    gate = next((a for a in product.args if a is not up.node), None)
    if not isinstance(gate, fx.Node) or not _alike(gate, product):
        return None
    return GatedSite(product, gate, up, down)


def _alike(gate: fx.Node, product: fx.Node) -> bool:
    one, other = value_of(gate), value_of(product)
    return bool(one.shape == other.shape and one.dtype == other.dtype)


class Thresholds:
    """The thresholds of a graph: one table in front of all layers, which stay alike.

    Linears of one input and threshold share an element of it.
    """

    def __init__(self, gm: fx.GraphModule, device: torch.device) -> None:
        self._gm, self._device = gm, device
        self._wanted: dict[tuple[fx.Node, float], int] = {}
        self._nodes: list[fx.Node] = []

    def want(self, input: fx.Node, value: float) -> int:
        """Ask for an element; return its number, for `node`."""
        return self._wanted.setdefault((input, value), len(self._wanted))

    def node(self, number: int) -> fx.Node:
        """Return an element, float32 []; the first call inserts the table."""
        if not self._nodes:
            self._insert()
        return self._nodes[number]

    def _insert(self) -> None:
        graph, values = self._gm.graph, [value for _, value in self._wanted]
        last = graph.find_nodes(op="placeholder")[-1]
        with graph.inserting_after(last):
            target = torch.ops.graphopt.thresholds.default
            table = last = graph.call_function(target, (values, self._device))
        with fake_mode_of(self._gm):
            table.meta["example_value"] = target(values, self._device)
        for index in range(len(values)):
            with graph.inserting_after(last):
                args = (table, 0, index)
                last = call(graph, torch.ops.aten.select.int, args)
            self._nodes.append(last)


def skip_columns(gm: fx.GraphModule, site: LinearSite, threshold: fx.Node) -> None:
    """Let a linear leave out the inputs up to ``threshold``."""
    source, _, _ = operands(site.node)  # may have been rewritten since it was found
    with gm.graph.inserting_before(site.node):
        args = (source, site.weight, site.bias, threshold, site.transposed)
        node = call(gm.graph, torch.ops.graphopt.sparse_linear.default, args)
    substitute(gm, site.node, node)


def skip_neurons(
    gm: fx.GraphModule, site: GatedSite, threshold: fx.Node, zero: fx.Node
) -> None:
    """Let an FFN leave out the neurons whose gate is up to ``threshold``."""
    up = site.up
    source, _, _ = operands(up.node)
    with gm.graph.inserting_before(site.product):
        args = (source, up.weight, up.bias, site.gate, threshold)
        node = call(gm.graph, torch.ops.graphopt.sparse_up.default, args)
    substitute(gm, site.product, node)
    gm.graph.erase_node(up.node)
    skip_columns(gm, site.down, zero)
