"""What raise found no place for in the layers, and a user would miss."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from torch import fx

from graphopt.ir.caches.sites import CacheSite, is_given
from graphopt.ir.match import op_name, shape_of
from graphopt.ir.stream.layers import Layer
from graphopt.ir.stream.trunk import is_floating

_ANGLES = ("cos", "polar", "view_as_complex")
_STORING = ("cat", "index_copy_", "copy_", "roll", "setitem")

Row = tuple[str, str, str]


def unplaced(graph: fx.Graph, layers: Sequence[Layer]) -> list[Row]:
    """Return (site, code, reason) of what is missing from ``layers``."""
    reason = "its input or output is not one value of a residual stream"
    rows = [
        (f"layer[{x.index}]", "no-residual", reason) for x in layers if not x.stream
    ]
    angles = next((n for n in graph.nodes if op_name(n) in _ANGLES), None)
    if layers and angles is not None and not any(x.rotary for x in layers):
        reason = f"{angles.name} turns no known query"
        rows.append(("graph", "no-rotary", reason))
    past = _past(x.cache for x in layers if x.cache)
    lost = [n.name for n in graph.nodes if _is_stored(n) and n not in past]
    if layers and lost:
        reason = (
            f"no known attention reads {lost[0]}, one of {len(lost)} cached tensors"
        )
        rows.append(("graph", "no-cache", reason))
    return rows


def _past(caches: Iterable[CacheSite]) -> set[fx.Node | None]:
    return {state.past for cache in caches for state in (cache.key, cache.value)}


def _is_stored(node: fx.Node) -> bool:
    """Tell whether the caller's [B, H, P, D] tensor is added to, as caches are."""
    if not is_given(node) or len(shape_of(node) or ()) != 4 or not is_floating(node):
        return False
    return any(op_name(user) in _STORING for user in node.users)
