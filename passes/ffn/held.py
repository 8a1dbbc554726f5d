"""Where a graph has the neurons that a cache keeps, and the FFNs that they are of."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

from torch import fx

from graphopt.errors import PassError
from graphopt.ir.match import op_name, shape_of, size_expr
from graphopt.ir.model_graph import ModelGraph
from graphopt.ir.shards import RankShare, share_of, summed_neurons
from graphopt.ir.sites.ffn import FfnSite
from graphopt.ir.stream.layers import Layer
from graphopt.passes.ffn.projection import Projection, projection_of

_SPELT = ("linear", "addmm")
_READABLE = (*_SPELT, "graphopt.onednn_linear")  # the weights are those of the model


@dataclass(frozen=True)
class Held:
    """What `graphopt::hold_neurons` holds for a layer."""

    node: fx.Node
    layer: Layer
    args: tuple[Any, ...]  # of the node, which is erased when the layer is done
    summed: fx.Node | None = None  # the sum over ranks behind the FFN
    apart: str = ""  # why the ranks' neurons cannot be told

    @property
    def counts(self) -> fx.Node:
        """Return the counts, int32 [R, F]."""
        found: fx.Node = self.args[0]
        return found

    @property
    def indices(self) -> fx.Node:
        """Return the chosen neurons, int64 [R, C]."""
        found: fx.Node = self.args[1]
        return found

    @property
    def shares(self) -> fx.Node | None:
        """Return the clusters, [K, F], or None."""
        found: fx.Node | None = self.args[7]
        return found

    @property
    def phase(self) -> str:
        """Return what the call does: one of `graphopt.ops.neurons.hold.PHASES`."""
        return str(self.args[8])

    @property
    def weight(self) -> int:
        """Return how often a token counts."""
        return int(self.args[9])

    @property
    def scales(self) -> tuple[fx.Node | None, ...]:
        """Return those of up, down and gate where they are codes, else nothing."""
        return self.args[10:]

    @property
    def kept(self) -> int:
        """Return how many neurons are chosen."""
        return int(size_expr((shape_of(self.indices) or ())[1]))

    @property
    def share(self) -> RankShare:
        """Return which part of the neurons this rank has."""
        return share_of(self.summed)

    @property
    def own(self) -> int:
        """Return how many neurons this rank has."""
        return int(size_expr(self.layer.ffn[0].neurons))

    @property
    def neurons(self) -> int:
        """Return how many neurons all ranks have together."""
        return self.own * self.share.ranks

    @property
    def room(self) -> int:
        """Return how many of the chosen neurons can be this rank's."""
        return min(self.kept, self.own)

    @property
    def place(self) -> str:
        """Return the name of the site in remarks."""
        return f"ffn[{self.layer.index}]"

    def projections(self, site: FfnSite) -> list[Projection]:
        """Return up, gate where there is one of its own, and down."""
        _, _, up, down, gate, up_bias, gate_bias, *_ = self.args
        of_up, of_down, of_gate, *_ = *self.scales, None, None, None
        fused = 2 if site.gate is site.up else 1
        found = [projection_of(site.up, up, up_bias, of_up, fused)]
        if site.gate is not None and fused == 1:
            found.append(projection_of(site.gate, gate, gate_bias, of_gate))
        return [*found, projection_of(site.down, down, None, of_down, is_down=True)]


def find_held(model: ModelGraph) -> list[Held]:
    """Return what is held, in graph order: each stands before its layer's attention."""
    order = {node: place for place, node in enumerate(model.gm.graph.nodes)}
    starts = [order[layer.attention.node] for layer in model.layers]
    found = []
    for node in model.gm.graph.nodes:
        if op_name(node) == "graphopt.hold_neurons":
            behind = bisect_right(starts, order[node])
            if behind < len(starts):
                layer = model.layers[behind]
                found.append(Held(node, layer, node.args, *_ranks(model, layer)))
    return found


def _ranks(model: ModelGraph, layer: Layer) -> tuple[fx.Node | None, str]:
    """Return the sum over ranks behind a layer's FFN, and why none can be used."""
    if len(layer.ffn) != 1:
        return None, ""
    try:
        summed = summed_neurons(model, layer.ffn[0])
        share_of(summed)  # raises where the operator does not name the ranks
    except PassError as error:
        return None, str(error)
    return summed, ""


def refusal(held: Held) -> tuple[str, str] | None:
    """Say why the FFN of a layer cannot run on the buffers; None where it can."""
    if len(held.layer.ffn) != 1:
        return "no-ffn", f"the layer has {len(held.layer.ffn)} feed-forward networks"
    if held.apart:
        return "sharded", held.apart
    site = held.layer.ffn[0]
    known = _SPELT if held.phase == "use" else _READABLE
    for linear in (site.up, site.down, site.gate or site.up):
        if op_name(linear) not in known:
            return "done", f"{linear.name} is spelt '{op_name(linear)}'"
    neurons = held.neurons
    if neurons != size_expr((shape_of(held.counts) or (0, 0))[1]):
        return "cache", f"the cache's buffers are not for {neurons} neurons"
    for projection in held.projections(site):
        if reason := projection.misfit(held.own, held.room):
            return "cache", reason
    return None
