"""Attention over paged keys and values: where `graphopt.Cache` is read, and its op."""

from __future__ import annotations

import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import fx

from graphopt._compat import size_hint
from graphopt.ir.attention.site import AttentionSite
from graphopt.ir.match import argument, float_of, op_name, shape_of, value_of
from graphopt.ir.replace import call, shared_arguments, substitute
from graphopt.ops.pages import PAGE

_HELD = 15  # the arguments of `graphopt.ops.pages.Held`, and where they begin
_RING_HEADS = 10
_STATE = 3  # statistics, selected, selected_at
_ALL_TOKENS = 20  # of read_pages, where layers may drop tokens


@dataclass(frozen=True)
class PageRead:
    """What a ``graphopt::read_pages`` node reads: every token of a layer without rings.

    ``tokens`` counts those of the longest row, those of the running call too.
    """

    key_pages: Any
    value_pages: Any
    key_scales: Any
    value_scales: Any
    table: Any
    past: Any
    tokens: Any

    @staticmethod
    def of(read: fx.Node) -> PageRead | None:
        """Return the parts of ``read``; None where streaming heads keep rings."""
        if read.args[_RING_HEADS]:
            return None
        parts = (*read.args[:5], read.args[_HELD - 2], read.args[_HELD + _STATE])
        return PageRead(*parts)


def read_of(site: AttentionSite) -> fx.Node | None:
    """Return the node that reads key and value of ``site`` out of pages, or None."""
    reads = [_read(node, place) for place, node in enumerate((site.key, site.value))]
    return reads[0] if reads[0] is reads[1] else None


def ring_heads(read: fx.Node) -> list[int]:
    """Return the KV heads of which ``read`` has rings, by this rank's numbers.

    Where they are symbols of the graph, those of the cache that it was traced with.
    """
    found: Any = read.args[_RING_HEADS]
    heads = (value_of(h) if isinstance(h, fx.Node) else h for h in found or ())
    return [int(size_hint(head)) for head in heads]


def _read(node: fx.Node, place: int) -> fx.Node | None:
    if op_name(node) != "getitem" or node.target is not operator.getitem:
        return None
    source, index = node.args
    is_read = isinstance(source, fx.Node) and op_name(source) == "graphopt.read_pages"
    return source if is_read and index == place else None  # type: ignore[return-value]


def replace_by_pages(
    gm: fx.GraphModule, site: AttentionSite, read: fx.Node, budget: int, interval: int
) -> fx.Node:
    """Put ``graphopt::page_attention`` in the place of ``site``; return its node.

    ``budget``: pages; ``interval``: tokens. The copy that ``read`` made is left
    without users.
    """
    state = read.args[: _HELD + _STATE]
    with gm.graph.inserting_before(site.node):
        mask, _, scale, softcap, _ = shared_arguments(gm.graph, site, 0)
        size_without_reading(read)
        mask = _visible(gm.graph, read, mask)
        args = (site.query, *state, mask, budget, interval, scale, softcap)
        node = call(gm.graph, torch.ops.graphopt.page_attention.default, args)
    return substitute(gm, site.node, node)


def size_without_reading(read: fx.Node) -> None:
    """Take the number of keys from the argument of ``read``, not from what it reads."""
    tokens = read.args[_HELD + _STATE]
    for keys in list(read.users):
        for user in list(keys.users):
            counts = op_name(user) == "size" and user.args[1:] == (2,)
            if counts and isinstance(tokens, fx.Node):
                user.replace_all_uses_with(tokens)
                user.graph.erase_node(user)


def may_drop(read: fx.Node) -> bool:
    """Tell whether ``read`` is of a layer that may hold fewer tokens than came."""
    return argument(read, _ALL_TOKENS, "all_tokens") is not None


def _visible(graph: fx.Graph, read: fx.Node, mask: fx.Node | None) -> fx.Node | None:
    """The places of a mask are those of tokens only in a layer that dropped none."""
    if mask is None or not may_drop(read):
        return mask
    past, new = read.args[_HELD - 2 : _HELD]
    args = (mask, past, new, argument(read, _ALL_TOKENS, "all_tokens"))
    return call(graph, torch.ops.graphopt.visible_tokens.default, args)


@dataclass(frozen=True)
class PagedSite(AttentionSite):
    """Attention that reads pages: ``key`` and ``value`` are pools [H, N, PAGE, D]."""

    @property
    def num_kv_heads(self) -> int:
        """Return the number of key and value heads, in full pools and in rings."""
        rings: Any = self.node.args[11]
        return int((shape_of(self.key) or ())[0]) + len(rings)

    @property
    def rings(self) -> tuple[int, int]:
        """Return how many KV heads keep a ring, and its pages."""
        heads: Any = self.node.args[11]
        kept = (size_hint(value_of(self.node.args[i])) for i in (12, 13))
        return len(heads), sum(kept)

    @property
    def budget(self) -> int:
        """Return the pages that a head reads."""
        return int(argument(self.node, 20, "budget"))

    @property
    def interval(self) -> int:
        """Return the tokens after which pages are chosen again."""
        return int(argument(self.node, 21, "interval"))

    @property
    def kv_len(self) -> Any:
        """Return the keys that the pages of a row have room for."""
        return (shape_of(self.node.args[5]) or ())[1] * PAGE


def match_pages(node: fx.Node) -> AttentionSite:
    """Return the site of a ``graphopt::page_attention`` node; its pages are data."""
    query, keys, values = (argument(node, i, "") for i in range(3))
    site = PagedSite(0, node, query, keys, values, "op", "pages")
    first = 1 + _HELD + _STATE
    return replace(
        site,
        key_mask=argument(node, first, "key_mask"),
        scale=argument(node, first + 3, "scale"),
        softcap=float_of(argument(node, first + 4, "softcap", 0.0)) or 0.0,
    )


@dataclass(frozen=True)
class PlacedSite(AttentionSite):
    """Attention to chosen places: ``key`` and ``value`` are pools [H, N, PAGE, D]."""

    @property
    def num_kv_heads(self) -> int:
        """Return the number of key and value heads."""
        return int((shape_of(self.key) or ())[0])

    @property
    def kv_len(self) -> Any:
        """Return the places that a row looks at."""
        return (shape_of(self.node.args[2]) or ())[1]


def match_places(node: fx.Node) -> AttentionSite:
    """Return the site of a ``graphopt::place_attention`` node."""
    query, keys, values = (argument(node, i, "") for i in (0, 4, 5))
    scale, softcap = argument(node, 8, "scale"), argument(node, 9, "softcap", 0.0)
    site = PlacedSite(0, node, query, keys, values, "op", "places")
    return replace(site, scale=scale, softcap=float_of(softcap) or 0.0)
