"""Normalisation sites: layer norms and RMS norms, as operators or spelled out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from graphopt.ir.casts import skip_casts
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
        elif _is_root(node):
            site = _from_root(node)
            found += [site] if site is not None else []
    return found


def _from_function(node: fx.Node, name: str) -> NormSite:
    kind = "layer" if name == "layer_norm" else "rms"
    eps = float_of(argument(node, 4 if kind == "layer" else 3, "eps"))
    weight = argument(node, 2, "weight")
    return NormSite(kind, node.args[0], node, weight, eps)  # type: ignore[arg-type]


def _from_root(root: fx.Node) -> NormSite | None:
    """Match y * rsqrt(mean(y^2, -1) + eps), then casts and the weight's product.

    y is the input (RMS norm), or the input without its mean (layer norm).
    """
    shifted: Any = root.args[0]
    mean: Any = shifted.args[0] if _is(shifted, "add") else None
    square: Any = mean.args[0] if _is(mean, "mean") else None
    if not _is_square(square):
        return None
    source = square.args[0]
    scaled = next((u for u in root.users if op_name(u) == "mul"), None)
    if not isinstance(source, fx.Node) or scaled is None:
        return None
    if not any(_same(source, factor) for factor in scaled.args):
        return None
    output, weight = _weighted(scaled)
    centred = _is_centred(source)
    value: Any = source.args[0] if centred else source
    kind = "layer" if centred else "rms"
    return NormSite(kind, value, output, weight, float_of(shifted.args[1]))


def _is(node: Any, *names: str) -> bool:
    return isinstance(node, fx.Node) and op_name(node) in names and bool(node.args)


def _is_square(node: Any) -> bool:
    if _is(node, "pow"):
        return float_of(node.args[1]) == 2.0
    return _is(node, "square") or (_is(node, "mul") and node.args[0] is node.args[1])


def _is_root(node: fx.Node) -> bool:
    """Tell whether ``node`` is 1 / sqrt(x), as an operator or as a power."""
    power = op_name(node) == "pow" and len(node.args) > 1
    return op_name(node) == "rsqrt" or (power and float_of(node.args[1]) == -0.5)


def _is_centred(node: fx.Node) -> bool:
    """Match x - mean(x, -1)."""
    if not _is(node, "sub") or len(node.args) < 2 or not _is(node.args[1], "mean"):
        return False
    return node.args[1].args[0] is node.args[0]  # type: ignore[union-attr]


def _same(left: fx.Node, right: Any) -> bool:
    """Tell whether two values are one, casts aside, or one difference taken twice."""
    if not isinstance(right, fx.Node):
        return False
    left, right = skip_casts(left), skip_casts(right)
    if left is right:
        return True
    return _is(left, "sub") and left.target == right.target and left.args == right.args


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
