"""Cut a graph into prologue, repeated layers and epilogue.

Layers are looked for by what repeats: the operator nodes are put in the order in which
Dynamo traced them, each with a signature (operator, literals, result types). Every
attention (or, without one, every most frequent heavy operator) anchors a layer. A cut
lies the same number of operators before each anchor, as far back as all layers agree.
Whether two layers are truly alike is decided later, on their whole graphs (`pieces`).
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import fx

_ANCHORS = (
    (
        "scaled_dot_product_attention",
        "graphopt.attention",
        "graphopt.visit_attention",
        "graphopt.page_attention",
        "graphopt.packed_attention",
        "graphopt.ragged_page_attention",
    ),
    ("softmax",),
)
_MIN_REPEATS = 3


def operator_nodes(graph: fx.Graph) -> list[fx.Node]:
    """Return the nodes that compute, in order: no placeholders and no output."""
    return [n for n in graph.nodes if n.op not in ("placeholder", "output")]


def target_name(node: fx.Node) -> str:
    """Return a name of the operator that is the same in every process."""
    if isinstance(node.target, str):
        return node.target
    module = getattr(node.target, "__module__", "")
    return f"{module}.{getattr(node.target, '__name__', node.target)}"


def type_of(value: object) -> object:
    """Return what must agree for two values to be handled by the same code."""
    if isinstance(value, torch.Tensor):
        layout = str(value.layout)
        stride = str(tuple(value.stride())) if value.layout == torch.strided else ""
        return (
            str(tuple(value.shape)),
            stride,
            str(value.dtype),
            str(value.device),
            layout,
            value.requires_grad,
        )
    if isinstance(value, (tuple, list)):
        return tuple(type_of(v) for v in value)
    return (type(value).__name__, str(value))


def find_layers(graph: fx.Graph) -> list[tuple[int, int]]:
    """Return the half-open ranges of operators that look like repeated layers.

    Empty when fewer than three repeat. Layers may differ in length (two kinds that
    alternate, say); they are contiguous.
    """
    nodes = operator_nodes(graph)
    signature = [target_name(n) for n in nodes]
    anchors = _anchors(nodes, signature)
    if len(anchors) < _MIN_REPEATS:
        return []
    back = _common_reach(signature, anchors, step=-1)
    starts = [anchor - back for anchor in anchors]
    ends = [*starts[1:], _last_end(signature, starts, anchors)]
    return list(zip(starts, ends, strict=True))


def _anchors(nodes: Sequence[fx.Node], signature: Sequence[str]) -> list[int]:
    for names in _ANCHORS:
        found = [i for i, s in enumerate(signature) if any(n in s for n in names)]
        if len(found) >= _MIN_REPEATS:
            return found
    return _anchors_by_weight(nodes)


def _anchors_by_weight(nodes: Sequence[fx.Node]) -> list[int]:
    """Without attention, take the first linear of every layer: equal weight shapes."""
    groups: dict[object, list[int]] = defaultdict(list)
    for i, node in enumerate(nodes):
        if "linear" in target_name(node) and len(node.args) > 1:
            weight = node.args[1]
            meta = (
                weight.meta.get("example_value") if isinstance(weight, fx.Node) else 0
            )
            groups[type_of(meta)].append(i)
    counts = Counter({key: len(value) for key, value in groups.items()})
    if not counts:
        return []
    key, count = max(counts.items(), key=lambda kv: (kv[1], -groups[kv[0]][0]))
    return groups[key] if count >= _MIN_REPEATS else []


def _common_reach(signature: Sequence[str], anchors: Sequence[int], step: int) -> int:
    """Return how far from its anchor every layer has the same operators."""
    shortest = min(b - a for a, b in pairwise(anchors))
    reach = 0
    while reach + 1 < shortest:
        at = [anchor + step * (reach + 1) for anchor in anchors]
        if at[0] < 0 or at[-1] >= len(signature):
            break
        if len({signature[i] for i in at}) > 1:
            break
        reach += 1
    return reach


def _last_end(
    signature: Sequence[str], starts: Sequence[int], anchors: Sequence[int]
) -> int:
    """The last layer ends where it stops reading like one of those before it."""
    best = anchors[-1] + 1
    for start, end in pairwise(starts):
        length = 0
        while (
            start + length < end
            and starts[-1] + length < len(signature)
            and signature[start + length] == signature[starts[-1] + length]
        ):
            length += 1
        if start + length == end:
            best = max(best, starts[-1] + length)
    return best
