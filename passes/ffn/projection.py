"""A linear of an FFN, and what a cache keeps of its weight."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from graphopt.ir.match import op_name, shape_of, size_expr
from graphopt.ir.sites.linear import operands


@dataclass(frozen=True)
class Projection:
    """A linear of an FFN and the buffer for its neurons' weights.

    ``dim``: the axis of its weight with the neurons; ``fused``: how many of them lie
    one behind the other; ``scales``: of the buffer's rows, where it is int8 codes.
    """

    node: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    buffer: fx.Node | None
    bias_buffer: fx.Node | None
    dim: int
    fused: int
    scales: fx.Node | None

    @property
    def transposed(self) -> bool:
        """Tell whether the weight lies as [inputs, outputs]."""
        return _is_transposed(self.node)

    @property
    def is_down(self) -> bool:
        """Tell whether the neurons are its inputs."""
        return self.dim != int(self.transposed)

    @property
    def buffers(self) -> list[tuple[fx.Node, fx.Node, int]]:
        """Return (weight, buffer, axis of the neurons) of what is gathered as it is."""
        found: list[tuple[fx.Node, fx.Node, int]] = []
        if self.buffer is not None and self.scales is None:
            found.append((self.weight, self.buffer, self.dim))
        if self.bias is not None and self.bias_buffer is not None:
            found.append((self.bias, self.bias_buffer, 0))
        return found

    def misfit(self, neurons: int, kept: int) -> str:
        """Say how it and its buffers do not fit; nothing where they do."""
        node, fused = self.node, self.fused
        wanted = [int(size_expr(n)) for n in shape_of(self.weight) or ()]
        if self.buffer is None or len(wanted) != 2:
            return f"it has no buffer for {node.name}"
        if wanted[self.dim] != fused * neurons:
            return f"the weight of {node.name} has no axis of {fused * neurons} neurons"
        wanted[self.dim] = fused * kept
        if self.scales is not None and self.transposed:
            wanted.reverse()  # codes lie as [outputs, inputs]
        found = [size_expr(n) for n in shape_of(self.buffer) or ()]
        if found[-2:] != wanted:
            return f"its buffer for {node.name} is {found} and not {wanted}"
        if not self.is_down and (self.bias is None) != (self.bias_buffer is None):
            return f"its buffers have another bias than {node.name}"
        return ""


def projection_of(
    node: fx.Node,
    buffer: Any,
    bias_buffer: Any,
    scales: Any,
    fused: int = 1,
    is_down: bool = False,
) -> Projection:
    """Return what is known of the linear ``node`` with what is kept of it."""
    _, weight, bias = operands(node)
    dim = int(_is_transposed(node) != is_down)
    return Projection(node, weight, bias, buffer, bias_buffer, dim, fused, scales)


def _is_transposed(linear: fx.Node) -> bool:
    return op_name(linear) == "addmm" or linear.args[3:4] == (True,)
