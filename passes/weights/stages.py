"""Which layers make a stage: as given, or neighbours whose parameters are alike."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from itertools import accumulate, pairwise
from math import inf, sqrt
from typing import Any

from torch import Tensor, fx

from graphopt._compat import real_value
from graphopt.ir.model_graph import ModelGraph
from graphopt.ir.sites.parameters import ParameterUse, described, parameter_uses
from graphopt.ir.stream.residual import LayerStream


@dataclass(frozen=True)
class StackLayer:
    """A layer of a stack: where it reads parameters that may be tied, and its shape.

    ``heads`` and ``ffn`` are what the parameters mean to the layer: (query heads, KV
    heads, channels of one) of each attention, (form, activation) of each FFN.
    """

    uses: tuple[ParameterUse, ...]
    heads: tuple[Any, ...]
    ffn: tuple[Any, ...]


def find_stacks(model: ModelGraph) -> list[list[StackLayer]]:
    """Return the stacks of layers in graph order (encoder, decoder, tower)."""
    return [
        [_stack_layer(model, part) for part in stream.layers]
        for stream in model.residual
    ]


def _stack_layer(model: ModelGraph, part: LayerStream) -> StackLayer:
    own = [model.layers[index] for index in part.attention]
    sites = [layer.attention for layer in own]
    heads = tuple((s.num_heads, s.num_kv_heads, s.head_dim) for s in sites)
    ffn = tuple((f.form, f.activation) for layer in own for f in layer.ffn)
    uses = parameter_uses(part, model.gm.graph, model.norms)
    return StackLayer(tuple(uses), heads, ffn)


def matches(use: ParameterUse, patterns: Sequence[str]) -> bool:
    """Tell whether a pattern is the use's role or fits its name (``*.mlp.*``)."""
    return any(p == use.role or fnmatchcase(use.name, p) for p in patterns)


def ranges(stages: Sequence[int]) -> list[range]:
    """Return the layers of each stage: [2, 1] are the layers 0 and 1, then 2."""
    return [range(a, b) for a, b in pairwise([0, *accumulate(stages)])]


def difference(first: StackLayer, other: StackLayer) -> tuple[str, str] | None:
    """Say why ``other`` cannot read the parameters of ``first``; None where it can."""
    if first.heads != other.heads:
        return "structure", f"attention differs: {first.heads} and {other.heads}"
    if first.ffn != other.ffn:
        return "structure", f"feed-forward parts differ: {first.ffn} and {other.ffn}"
    if len(first.uses) != len(other.uses):
        counts = f"{len(first.uses)} and {len(other.uses)}"
        return "structure", f"they read parameters in {counts} places"
    for one, two in zip(first.uses, other.uses, strict=True):
        if (one.user.target, one.place, one.role) != (
            two.user.target,
            two.place,
            two.role,
        ):
            return "structure", f"{described(one)} is {described(two)} in the other"
        if one.form != two.form:
            return "shape", f"{described(one)} and {described(two)} differ"
    return _inconsistent(pairs(first, other))


def pairs(first: StackLayer, other: StackLayer) -> list[tuple[fx.Node, fx.Node]]:
    """Return each parameter of ``other`` with that of ``first`` in its place."""
    both = zip(other.uses, first.uses, strict=True)
    return list(dict.fromkeys((two.parameter, one.parameter) for two, one in both))


def _inconsistent(found: list[tuple[fx.Node, fx.Node]]) -> tuple[str, str] | None:
    if len(dict(found)) < len(found):
        return "structure", "one parameter stands for several of the other layer"
    return None


def distance(first: StackLayer, other: StackLayer, untied: Sequence[str]) -> float:
    """Return sqrt(sum |a - b|^2 / sum (|a|^2 + |b|^2)) over the parameters to be tied.

    0 for equal layers, 1 for unrelated ones, inf where they cannot be tied. Raises
    ValueError where the graph does not hold the values.
    """
    if difference(first, other):
        return inf
    apart = total = 0.0
    for one, two in zip(first.uses, other.uses, strict=True):
        if not matches(two, untied) and one.parameter is not two.parameter:
            a, b = _value(one), _value(two)
            apart += float((a - b).square().sum())
            total += float(a.square().sum() + b.square().sum())
    return sqrt(apart / total) if total else 0.0


def _value(use: ParameterUse) -> Tensor:
    value = real_value(use.parameter)
    if value is None:
        raise ValueError(f"{use.name} has no values where this graph was captured")
    return value.detach().double()


def alike(
    layers: Sequence[StackLayer], tolerance: float, untied: Sequence[str]
) -> tuple[list[int], list[float]]:
    """Return stages of neighbours, and each layer's distance to its stage's first one.

    A layer joins while that distance is at most ``tolerance``; what a layer that begins
    a stage has is its distance to the first layer of the stage before.
    """
    stages, distances, first = [1], [0.0], layers[0]
    for layer in layers[1:]:
        distances.append(distance(first, layer, untied))
        if distances[-1] <= tolerance:
            stages[-1] += 1
        else:
            stages.append(1)
            first = layer
    return stages, distances
