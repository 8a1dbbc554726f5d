"""The predicted cost of one attention site of a prefill."""

from __future__ import annotations

from collections import Counter
from typing import Any

from graphopt.cost import AttentionShape, attention_cost
from graphopt.ir.attention.fused import visit_tables
from graphopt.ir.attention.site import AttentionSite
from graphopt.ir.match import argument


def site_figures(site: AttentionSite, tokens: int) -> dict[str, Any]:
    """Return pattern, GFLOP and MB of a site for a prefill of ``tokens``, batch 1."""
    visited = _visited(site, tokens)
    return {
        "pattern": _label(site, visited),
        "gflop": _flops(site, visited, tokens) / 1e9,
        "mb": _bytes(site, tokens) / 1e6,
    }


# (pattern, sink, window), and (vertical, slash) for visit lists
Visited = Counter[tuple[Any, ...]]


def _visited(site: AttentionSite, tokens: int) -> Visited:
    """Return how many heads visit the keys of which (pattern, sink, window)."""
    if site.form != "op":
        # A mask tensor is added after every product was taken: all pairs are visited.
        pattern = "full" if site.mask is not None else site.pattern
        return Counter({(pattern, 0, site.window): site.num_heads})
    arguments: tuple[Any, ...] = site.node.args
    is_visit = site.pattern == "visit-list"
    minimum = argument(site.node, 12 if is_visit else 10, "min_tokens", 0)
    if isinstance(minimum, int) and tokens < minimum:
        return Counter({("causal", 0, 0): site.num_heads})
    if is_visit:
        return Counter(("visit-list", *row) for row in visit_tables(site))
    pattern, sink, window = arguments[4:7]
    tables = [(list(t) * site.num_heads)[: site.num_heads] for t in (sink, window)]
    return Counter((str(pattern), *row) for row in zip(*tables, strict=True))


def _label(site: AttentionSite, visited: Visited) -> str:
    names = "+".join(sorted({row[0] for row in visited}))
    return names if site.form == "op" or site.mask is None else f"{names}, masked"


def _flops(site: AttentionSite, visited: Visited, tokens: int) -> float:
    total = 0.0
    for (pattern, *sizes), heads in visited.items():
        shape = AttentionShape(heads, site.num_kv_heads, site.head_dim, site.itemsize)
        total += attention_cost(shape, pattern, *sizes).at(1, tokens)[0]
    return total


def _bytes(site: AttentionSite, tokens: int) -> float:
    """Count q, k, v and the output, repeated KV heads and the mask where they exist."""
    expands = site.form != "op" and site.repeats_heads
    kv_heads = site.num_heads if expands else site.num_kv_heads
    shape = AttentionShape(site.num_heads, kv_heads, site.head_dim, site.itemsize)
    total = attention_cost(shape, "causal").at(1, tokens)[1]
    return total + (tokens**2 if site.form != "op" and site.mask is not None else 0)
