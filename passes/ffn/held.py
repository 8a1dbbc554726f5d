"""Where a graph has the neurons that a cache keeps, and the FFNs that they are of."""

from __future__ import annotations

from bisect import bisect_right
from dataclasses import dataclass
from typing import Any

from torch import fx

from graphopt.ir.match import op_name, shape_of, size_expr
from graphopt.ir.model_graph import ModelGraph
from graphopt.ir.sites.ffn import FfnSite
from graphopt.ir.sites.linear import operands
from graphopt.ir.stream.layers import Layer

_SPELT = ("linear", "addmm")
_READABLE = (*_SPELT, "graphopt.onednn_linear")  # the weights are those of the model


@dataclass(frozen=True)
class Projection:
    """A linear of an FFN and the buffer for its neurons' weights.

    ``dim``: the axis of its weight with the neurons; ``fused``: how many of them lie
    one behind the other.
    """

    node: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    buffer: fx.Node | None
    bias_buffer: fx.Node | None
    dim: int
    fused: int

    @property
    def transposed(self) -> bool:
        """Tell whether the weight lies as [inputs, outputs]."""
        return _is_transposed(self.node)

    @property
    def buffers(self) -> list[tuple[fx.Node, fx.Node, int]]:
        """Return (weight, buffer, axis of the neurons) of what is gathered."""
        found: list[tuple[fx.Node, fx.Node, int]] = []
        if self.buffer is not None:
            found.append((self.weight, self.buffer, self.dim))
        if self.bias is not None and self.bias_buffer is not None:
            found.append((self.bias, self.bias_buffer, 0))
        return found


@dataclass(frozen=True)
class Held:
    """What `graphopt::hold_neurons` holds for a layer."""

    node: fx.Node
    layer: Layer
    args: tuple[Any, ...]  # of the node, which is erased when the layer is done

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
    def kept(self) -> int:
        """Return how many neurons are chosen."""
        return int(size_expr((shape_of(self.indices) or ())[1]))

    @property
    def place(self) -> str:
        """Return the name of the site in remarks."""
        return f"ffn[{self.layer.index}]"

    def projections(self, site: FfnSite) -> list[Projection]:
        """Return up, gate where there is one of its own, and down."""
        _, _, up, down, gate, up_bias, gate_bias, *_ = self.args
        fused = 2 if site.gate is site.up else 1
        found = [_projection(site.up, up, up_bias, fused)]
        if site.gate is not None and fused == 1:
            found.append(_projection(site.gate, gate, gate_bias, 1))
        return [*found, _projection(site.down, down, None, 1, is_down=True)]


def find_held(model: ModelGraph) -> list[Held]:
    """Return what is held, in graph order: each stands before its layer's attention."""
    order = {node: place for place, node in enumerate(model.gm.graph.nodes)}
    starts = [order[layer.attention.node] for layer in model.layers]
    found = []
    for node in model.gm.graph.nodes:
        if op_name(node) == "graphopt.hold_neurons":
            behind = bisect_right(starts, order[node])
            if behind < len(starts):
                found.append(Held(node, model.layers[behind], node.args))
    return found


def refusal(held: Held) -> tuple[str, str] | None:
    """Say why the FFN of a layer cannot run on the buffers; None where it can."""
    if len(held.layer.ffn) != 1:
        return "no-ffn", f"the layer has {len(held.layer.ffn)} feed-forward networks"
    site = held.layer.ffn[0]
    known = _SPELT if held.phase == "use" else _READABLE
    for linear in (site.up, site.down, site.gate or site.up):
        if op_name(linear) not in known:
            return "done", f"{linear.name} is spelt '{op_name(linear)}'"
    neurons = size_expr(site.neurons)
    if neurons != size_expr((shape_of(held.counts) or (0, 0))[1]):
        return "cache", f"the cache's buffers are not for {neurons} neurons"
    for projection in held.projections(site):
        if reason := _misfit(projection, int(neurons), held.kept):
            return "cache", reason
    return None


def _projection(
    node: fx.Node, buffer: Any, bias_buffer: Any, fused: int, is_down: bool = False
) -> Projection:
    _, weight, bias = operands(node)
    transposed = _is_transposed(node)
    dim = int(transposed != is_down)
    return Projection(node, weight, bias, buffer, bias_buffer, dim, fused)


def _is_transposed(linear: fx.Node) -> bool:
    return op_name(linear) == "addmm" or linear.args[3:4] == (True,)


def _misfit(projection: Projection, neurons: int, kept: int) -> str:
    """Say how a projection and its buffers do not fit; nothing where they do."""
    node, fused = projection.node, projection.fused
    wanted = [int(size_expr(n)) for n in shape_of(projection.weight) or ()]
    if projection.buffer is None or len(wanted) != 2:
        return f"it has no buffer for {node.name}"
    if wanted[projection.dim] != fused * neurons:
        return f"the weight of {node.name} has no axis of {fused * neurons} neurons"
    wanted[projection.dim] = fused * kept
    found = [size_expr(n) for n in shape_of(projection.buffer) or ()]
    if found[-2:] != wanted:
        return f"its buffer for {node.name} is {found} and not {wanted}"
    is_down = projection.dim != int(projection.transposed)
    if not is_down and (projection.bias is None) != (projection.bias_buffer is None):
        return f"its buffers have another bias than {node.name}"
    return ""
