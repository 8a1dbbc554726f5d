"""Normalisation sites: RMS norms spelled out, and layer norms."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from graphopt.ir.match import argument, float_of, op_name, shape_of

_CASTS = ("to", "float", "contiguous", "type_as")


@dataclass(frozen=True)
class NormSite:
    """A norm over the last axis: ``kind`` rms or layer, ``output`` the scaled value."""

    kind: str
    input: fx.Node
    output: fx.Node
    weight: fx.Node | None
    eps: float | None


def find_norms(gm: fx.GraphModule) -> list[NormSite]:
    """Return the norms of ``gm`` in graph order."""
    found = []
    for node in gm.graph.nodes:
        name = op_name(node)
        if name == "layer_norm" or name == "rms_norm":
            found.append(_from_function(node, name))
        elif name == "rsqrt":
            site = _from_rsqrt(node)
            found += [site] if site is not None else []
    return found


def _from_function(node: fx.Node, name: str) -> NormSite:
    kind = "layer" if name == "layer_norm" else "rms"
    eps = float_of(argument(node, 4 if kind == "layer" else 3, "eps"))
    weight = argument(node, 2, "weight")
    return NormSite(kind, node.args[0], node, weight, eps)  # type: ignore[arg-type]


def _from_rsqrt(rsqrt: fx.Node) -> NormSite | None:
    """Match x * rsqrt(mean(x^2, -1) + eps), then casts and the weight's product."""
    shifted = rsqrt.args[0]
    if not isinstance(shifted, fx.Node) or op_name(shifted) != "add":
        return None
    mean = shifted.args[0]
    if not isinstance(mean, fx.Node) or op_name(mean) != "mean":
        return None
    square = mean.args[0]
    if not isinstance(square, fx.Node) or op_name(square) not in (
        "pow",
        "square",
        "mul",
    ):
        return None
    source = square.args[0]
    scaled = next((u for u in rsqrt.users if op_name(u) == "mul"), None)
    if not isinstance(source, fx.Node) or scaled is None or source not in scaled.args:
        return None
    output, weight = _weighted(scaled)
    return NormSite("rms", source, output, weight, float_of(shifted.args[1]))


def _weighted(scaled: fx.Node) -> tuple[fx.Node, fx.Node | None]:
    node, end = scaled, scaled
    for _ in range(3):
        if len(node.users) != 1:
            break
        user = next(iter(node.users))
        if op_name(user) == "mul":
            others = [a for a in user.all_input_nodes if a is not node]
            if len(others) == 1 and len(shape_of(others[0]) or (0, 0)) == 1:
                return user, others[0]
            break
        if op_name(user) not in _CASTS:
            break
        node = user
    return end, None
