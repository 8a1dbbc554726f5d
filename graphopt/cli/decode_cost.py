"""The predicted cost of one attention site of a decoding step."""

from __future__ import annotations

from typing import Any

from graphopt.cost import AttentionShape, Cost
from graphopt.decode_cost import dense_step, pages_step, places_step, ring_step
from graphopt.ir.attention.pages import PagedSite, PlacedSite
from graphopt.ir.attention.site import AttentionSite
from graphopt.ir.match import size_expr


def step_figures(site: AttentionSite, tokens: int, copied: bool) -> dict[str, Any]:
    """Return pattern, MFLOP and MB of a site with ``tokens`` in the cache, batch 1.

    ``copied``: whether a site that reads no pages reads a copy of the cache.
    """
    flops, moved = _cost(site, tokens, copied).at(1, tokens)
    return {"pattern": site.pattern, "mflop": flops / 1e6, "mb": moved / 1e6}


def _cost(site: AttentionSite, tokens: int, copied: bool) -> Cost:
    if isinstance(site, PlacedSite):
        return places_step(_shape(site, site.num_kv_heads), _seen(site, tokens))
    if not isinstance(site, PagedSite):
        return dense_step(_shape(site, site.num_kv_heads), copied)
    rings, kept = site.rings
    full = _shape(site, site.num_kv_heads - rings)
    chosen = pages_step(full, site.budget, site.interval)
    ring = ring_step(_shape(site, rings), kept)
    return Cost(chosen.flops + ring.flops, chosen.bytes + ring.bytes)


def _seen(site: PlacedSite, tokens: int) -> int:
    """Return the places that are seen with ``tokens`` in the cache, the new one too."""
    expr: Any = size_expr(site.kv_len)
    return int(expr.subs(dict.fromkeys(expr.free_symbols, tokens - 1)))


def _shape(site: AttentionSite, kv_heads: int) -> AttentionShape:
    group = site.num_heads // site.num_kv_heads
    return AttentionShape(group * kv_heads, kv_heads, site.head_dim, site.itemsize)
