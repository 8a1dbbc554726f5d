"""The parameters that a layer reads, and reading others in their place."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from graphopt.ir.constants import is_parameter, parameter_name
from graphopt.ir.match import op_name, value_of
from graphopt.ir.sites.linear import is_linear, operands
from graphopt.ir.sites.norms import NormSite
from graphopt.ir.stream.residual import LayerStream

# On a node: the names of the inputs that it read before a pass gave it others. The
# text of a graph tells by them which layer the node belongs to.
READ_BEFORE = "graphopt_read_before"


@dataclass(frozen=True)
class ParameterUse:
    """``user`` reads ``parameter`` as the input number ``place``.

    ``role`` is norm (scale or shift of a norm), bias (of a linear) or weight.
    """

    user: fx.Node
    parameter: fx.Node
    place: int
    role: str

    @property
    def name(self) -> str:
        """Return the parameter's name in the model, or that of its node."""
        return parameter_name(self.parameter) or self.parameter.name

    @property
    def form(self) -> tuple[object, ...]:
        """Return what agrees where another parameter can be read in its place."""
        value = value_of(self.parameter)
        layout = (str(tuple(value.shape)), str(value.stride()), str(value.dtype))
        return (*layout, str(value.device), type(value), value.requires_grad)


def parameter_uses(
    stream: LayerStream, graph: fx.Graph, norms: Sequence[NormSite]
) -> list[ParameterUse]:
    """Return in graph order where the nodes between a layer's ends read parameters.

    Buffers are not among them: what they hold may be the layer's own state.
    """
    nodes = list(graph.nodes)
    start, end = nodes.index(stream.input), nodes.index(stream.output)
    scales = {n.output for n in norms} | {n.weight for n in norms}
    return [
        ParameterUse(node, source, place, _role(node, source, scales))
        for node in nodes[start + 1 : end + 1]
        for place, source in enumerate(node.all_input_nodes)
        if is_parameter(source) and isinstance(value_of(source), torch.nn.Parameter)
    ]


def _role(user: fx.Node, parameter: fx.Node, scales: set[fx.Node | None]) -> str:
    if user in scales or parameter in scales:
        return "norm"
    return "bias" if is_linear(user) and operands(user)[2] is parameter else "weight"


def read_instead(
    uses: Sequence[ParameterUse], others: Mapping[fx.Node, fx.Node]
) -> int:
    """Let ``uses`` read ``others``; return the bytes that nothing reads any more."""
    for use in uses:
        other = others.get(use.parameter, use.parameter)
        if other is not use.parameter:
            use.user.replace_input_with(use.parameter, other)
            before = use.user.meta.get(READ_BEFORE, ())
            use.user.meta[READ_BEFORE] = (*before, use.parameter.name)
    left = {use.parameter: None for use in uses if not use.parameter.users}
    return sum(value_of(n).numel() * value_of(n).itemsize for n in left)


def described(use: ParameterUse) -> str:
    """Return a use as a remark names it."""
    shape = "x".join(map(str, value_of(use.parameter).shape))
    return f"{op_name(use.user)} of {use.name} ({shape})"
