"""The two ends of a language model: the token embedding and the LM head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt.ir.caches.sites import is_given
from graphopt.ir.casts import CASTS
from graphopt.ir.match import argument, op_name, shape_of, value_of
from graphopt.ir.sites.linear import is_linear, operands
from graphopt.ir.sites.norms import NormSite
from graphopt.ir.stream.trunk import SELECTING, Trunk, width

_ON_LOGITS = (*CASTS, "contiguous", "add", "mul", "div", "tanh", "clone")
_ON_IDS = (*CASTS, "reshape", "long", "int", "contiguous", "clone", "expand", "getitem")
_FILLING = ("where", "masked_fill")
_MAX_STEPS = 12
_INPUT_ONLY = 16  # at most one id of so many is never predicted


@dataclass(frozen=True)
class EmbeddingSite:
    """``node`` [B, S, H] = rows of ``weight`` [V, H] at ``ids`` [B, S]."""

    node: fx.Node
    ids: fx.Node
    weight: fx.Node

    @property
    def vocabulary(self) -> int | None:
        """Return the number of rows, when it is known."""
        shape = shape_of(self.weight) or (None,)
        return shape[0] if isinstance(shape[0], int) else None


@dataclass(frozen=True)
class HeadSite:
    """The LM head: ``logits`` [B, S', V] = ``input`` [B, S', H] times ``weight``.

    ``hidden`` [B, S, H] is the input before tokens are selected (``logits_to_keep``);
    ``norm`` the norm that it comes from; ``output`` the logits as the graph returns
    them, scaled or soft-capped. ``weight`` is [V, H], or [H, V] for an addmm, and
    ``tied`` says that it is the embedding's.
    """

    logits: fx.Node
    output: fx.Node
    input: fx.Node
    hidden: fx.Node
    norm: NormSite | None
    weight: fx.Node
    bias: fx.Node | None
    tied: bool


def find_embeddings(gm: fx.GraphModule) -> list[EmbeddingSite]:
    """Return the embeddings of token ids that the caller gave, in graph order.

    Those of positions and of segments may be among them when the caller gave these.
    """
    found = []
    for node in gm.graph.nodes:
        if op_name(node) == "embedding":
            ids, weight = node.args[0], argument(node, 1, "weight")
            if isinstance(weight, fx.Node) and _are_given(ids):
                found.append(EmbeddingSite(node, ids, weight))
    return found


def find_head(
    gm: fx.GraphModule, embeddings: Sequence[EmbeddingSite], trunk: Trunk
) -> HeadSite | None:
    """Return the LM head, or None: its linear has one row for each token id.

    A graph without an embedding (``inputs_embeds``) shows no vocabulary, so that its
    head stays unknown.
    """
    weights = [e.weight for e in embeddings]
    for output in _outputs(gm.graph):
        linear = _linear_before(output)
        if linear is not None and any(_predicts(linear, e) for e in embeddings):
            return _head(linear, output, weights, trunk)
    return None


def _predicts(linear: fx.Node, embedding: EmbeddingSite) -> bool:
    """Tell whether ``linear`` scores the ids of ``embedding``.

    A few ids, of images or padding, may be inputs only; a classifier has far less rows.
    """
    rows, ids = width(linear) or 0, embedding.vocabulary or 0
    return 0 <= ids - rows <= ids // _INPUT_ONLY


def token_embedding(
    embeddings: Sequence[EmbeddingSite], head: HeadSite | None
) -> EmbeddingSite | None:
    """Return the embedding of the token ids that the head predicts.

    The one whose weight is tied to the head, or that has its number of rows, or the
    only one; the last of several that share a weight (a decoder's). Otherwise None.
    """
    tied = [e for e in embeddings if head is not None and e.weight is head.weight]
    alike = [e for e in embeddings if head is not None and _predicts(head.logits, e)]
    found = tied or alike or list(embeddings)
    return found[-1] if len({e.weight for e in found}) == 1 else None


def _head(
    linear: fx.Node, output: fx.Node, weights: list[fx.Node], trunk: Trunk
) -> HeadSite:
    source, weight, bias = operands(linear)
    path = trunk.path(source)
    kinds = [trunk.kind(node) for node in path]
    before = kinds.index("norm") if "norm" in kinds else len(kinds) - 1
    hidden, norm = path[_after_selection(kinds[:before])], trunk.norm(path[before])
    tied = weight in weights
    return HeadSite(linear, output, source, hidden, norm, weight, bias, tied)


def _after_selection(kinds: list[str]) -> int:
    """Return the place behind the selection of tokens that is furthest back."""
    places = [i + 1 for i, kind in enumerate(kinds) if kind in SELECTING]
    return places[-1] if places else 0


def _outputs(graph: fx.Graph) -> Iterator[fx.Node]:
    """Yield the tensors that ``graph`` returns, the last ones first: logits are."""
    for node in reversed(graph.find_nodes(op="output")[0].all_input_nodes):
        if isinstance(value_of(node), torch.Tensor):
            yield node


def _linear_before(output: fx.Node) -> fx.Node | None:
    """Return the linear whose result is ``output`` but for scale, cap and dtype."""
    node: Any = output
    for _ in range(_MAX_STEPS):
        if not isinstance(node, fx.Node) or is_linear(node):
            return node if isinstance(node, fx.Node) else None
        if op_name(node) not in _ON_LOGITS or not node.args:
            return None
        node = node.args[0]
    return None


def _are_given(ids: Any) -> bool:
    """Tell whether integers come from the caller, some perhaps filled in."""
    for _ in range(_MAX_STEPS):
        if not isinstance(ids, fx.Node) or ids.op == "placeholder":
            break
        name = op_name(ids)
        if name in _FILLING:
            tensors = [n for n in ids.all_input_nodes if not _is_bool(n)]
            ids = tensors[0] if len(tensors) == 1 else None
        else:
            ids = ids.args[0] if name in _ON_IDS and ids.args else None
    return isinstance(ids, fx.Node) and is_given(ids)


def _is_bool(node: fx.Node) -> bool:
    return getattr(value_of(node), "dtype", None) == torch.bool
