"""Find where image features are written among the embeddings of a prompt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import fx

from graphopt.ir.attention.site import AttentionSite, find_attention
from graphopt.ir.match import argument, op_name, sizes_of, value_of
from graphopt.ir.model_graph import ModelGraph
from graphopt.ir.vision.insert import insert

_ROW_BY_ROW = 3  # axes of embeddings: batch rows, tokens, channels


@dataclass(frozen=True)
class VisionWrite:
    """``node`` [B, S, H] is the embeddings with ``features`` in the places of ``mask``.

    features [F, H], or more axes with as many elements; mask bool [B, S, 1] or
    [B, S, H]. Given from outside, features may have a symbol for H.
    """

    node: fx.Node
    mask: fx.Node
    features: fx.Node


@dataclass(frozen=True)
class VisionSpan:
    """All that is written into one prompt (images, videos), in graph order."""

    writes: tuple[VisionWrite, ...]

    @property
    def node(self) -> fx.Node:
        """Return the embeddings with everything written, [B, S, H]."""
        return self.writes[-1].node


class LanguageGraph(ModelGraph):
    """The language model of a graph that may hold the encoder of the images too.

    Its attention is what reads the embeddings of ``span``, numbered from 0, so that
    layers, tokens and sizes are the language model's.
    """

    @cached_property
    def span(self) -> VisionSpan | None:
        """Return where images enter; None where none does."""
        return find_vision(self.gm)

    @cached_property
    def attention(self) -> list[AttentionSite]:
        """Return the language model's attention sites in graph order."""
        span = self.span
        return find_attention(self.gm) if span is None else _language(self.gm, span)


def find_vision(gm: fx.GraphModule) -> VisionSpan | None:
    """Return where image features enter the embeddings of a prompt, or None.

    They are written through a mask of tokens, and attention reads the result.
    """
    writes = [w for node in gm.graph.nodes if (w := _write(node)) is not None]
    if not writes or not _language(gm, VisionSpan(tuple(writes))):
        return None
    return VisionSpan(tuple(writes))


def _write(node: fx.Node) -> VisionWrite | None:
    if op_name(node) not in ("masked_scatter", "masked_scatter_"):
        return None
    embeddings, mask = node.args[0], argument(node, 1, "mask")
    features = argument(node, 2, "source")
    given = (embeddings, mask, features)
    if not all(isinstance(n, fx.Node) for n in given):
        return None
    sizes, places = sizes_of(embeddings), sizes_of(mask)
    rows = len(sizes) == len(places) == _ROW_BY_ROW and sizes[:2] == places[:2]
    return VisionWrite(node, mask, features) if rows and _is_bool(mask) else None


def _is_bool(node: fx.Node) -> bool:
    return getattr(value_of(node), "dtype", None) == torch.bool


def _language(gm: fx.GraphModule, span: VisionSpan) -> list[AttentionSite]:
    """Return the sites whose queries are computed from the embeddings, from 0 on."""
    reached = descendants(gm.graph, [span.node])
    sites = [site for site in find_attention(gm) if site.query in reached]
    return [replace(site, index=i) for i, site in enumerate(sites)]


def descendants(graph: fx.Graph, sources: Sequence[fx.Node]) -> set[fx.Node]:
    """Return what is computed from ``sources``, themselves too."""
    found: set[fx.Node] = set(sources)
    for node in graph.nodes:
        if not found.isdisjoint(node.all_input_nodes):
            found.add(node)
    return found


def vision_mask(graph: fx.Graph, span: VisionSpan) -> fx.Node:
    """Insert the mask of all vision tokens, bool [B, S], at the insertion point."""
    masks = [insert(graph, "select", write.mask, -1, 0) for write in span.writes]
    found = masks[0]
    for mask in masks[1:]:
        found = insert(graph, torch.logical_or, found, mask)
    return found
