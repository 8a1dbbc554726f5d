"""Feed-forward sites: activation between two linears, gated or plain."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import fx

from graphopt.ir.match import op_name, shape_of
from graphopt.ir.sites.linear import is_linear

ACTIVATIONS = ("silu", "gelu", "relu", "tanh", "sigmoid", "quick_gelu", "mish", "relu6")
_FORMULA = ("mul", "add", "pow", "tanh", "erf", "sigmoid", "div")
_SHAPING = ("to", "float", "contiguous", "reshape", "dropout", "clone", "getitem")


@dataclass(frozen=True)
class FfnSite:
    """An FFN: ``form`` gated (act(gate) * up) or plain; ``neurons`` is its inner width.

    ``up`` and ``down`` are the linear nodes, ``gate`` that of the gate; a fused
    gate-and-up projection is ``gate`` and ``up`` at once.
    """

    form: str
    activation: str
    up: fx.Node
    down: fx.Node
    gate: fx.Node | None
    neurons: Any


def find_ffn(gm: fx.GraphModule) -> list[FfnSite]:
    """Return the FFNs of ``gm`` in graph order; experts behind routing are no sites."""
    sites: list[FfnSite] = []
    for node in gm.graph.nodes:
        if is_linear(node):
            site = _ending_in(node)
            sites += [site] if site is not None else []
    return sites


def _ending_in(down: fx.Node) -> FfnSite | None:
    inner = down.args[1] if op_name(down) == "addmm" else down.args[0]
    inner = _through(inner)
    if inner is None:
        return None
    neurons = (shape_of(inner) or (None,))[-1]
    if op_name(inner) == "graphopt.sparse_up":
        return _skipping(inner, down, neurons)
    if op_name(inner) == "mul":
        return _gated(inner, down, neurons) or _plain(inner, down, neurons)
    return _plain(inner, down, neurons)


def _gated(product: fx.Node, down: fx.Node, neurons: Any) -> FfnSite | None:
    sides = [_through(a) for a in product.args[:2]]
    for act, other in (sides, sides[::-1]):
        if act is None or other is None or op_name(act) not in ACTIVATIONS:
            continue
        gate, up = _linear_before(act.args[0]), _linear_before(other)
        if gate is not None and up is not None:
            return FfnSite("gated", op_name(act), up, down, gate, neurons)
    return None


def _skipping(up: fx.Node, down: fx.Node, neurons: Any) -> FfnSite | None:
    """Gate times up in one operator: (input, weight, bias, gate, threshold)."""
    act = _through(up.args[3])
    gate = None if act is None else _linear_before(act.args[0])
    if act is None or gate is None:
        return None
    return FfnSite("gated", op_name(act), up, down, gate, neurons)


def _plain(inner: fx.Node, down: fx.Node, neurons: Any) -> FfnSite | None:
    """An activation may be one node, or the tanh formula of GELU spelled out."""
    if op_name(inner) in ACTIVATIONS:
        up = _linear_before(inner.args[0])
        name = op_name(inner)
    else:
        up, name = _spelled_out(inner), "gelu"
    return FfnSite("plain", name, up, down, None, neurons) if up is not None else None


def _spelled_out(inner: fx.Node) -> fx.Node | None:
    """Find the one linear from which everything between comes, a tanh on the way."""
    if op_name(inner) != "mul":
        return None
    pending, tanh = [inner], False
    seen: set[fx.Node] = set()
    sources: set[fx.Node] = set()
    while pending and len(seen) < 24:
        node = pending.pop()
        if node in seen:
            continue
        seen.add(node)
        if is_linear(node):
            sources.add(node)
            continue
        tanh |= op_name(node) in ("tanh", "erf", "sigmoid")
        if op_name(node) not in (*_FORMULA, *_SHAPING):
            return None
        # Sizes and scalars lead elsewhere.
        pending += [n for n in node.all_input_nodes if shape_of(n) is not None]
    return sources.pop() if tanh and len(sources) == 1 and not pending else None


def _linear_before(value: Any) -> fx.Node | None:
    node = _through(value, also=("chunk", "split"))
    return node if node is not None and is_linear(node) else None


def _through(value: Any, also: tuple[str, ...] = ()) -> fx.Node | None:
    while isinstance(value, fx.Node) and op_name(value) in (*_SHAPING, *also):
        value = value.args[0]
    return value if isinstance(value, fx.Node) else None
