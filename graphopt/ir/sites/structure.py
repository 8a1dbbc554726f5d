"""The structure that raise found, as plain data for reports and ``explain``."""

from __future__ import annotations

from typing import Any

from torch import fx

from graphopt.ir.match import shape_of
from graphopt.ir.model_graph import ModelGraph
from graphopt.ir.stream.layers import Layer


def structure_rows(model: ModelGraph) -> list[dict[str, Any]]:
    """Return one row a layer: heads, pattern, FFN, norms, rotary, cache."""
    return [_row(layer) for layer in model.layers]


def _row(layer: Layer) -> dict[str, Any]:
    site = layer.attention
    return {
        "layer": layer.index,
        "attention": site.form,
        "pattern": site.pattern,
        "window": site.window,
        "padding": site.key_mask is not None,
        "heads": site.num_heads,
        "kv_heads": site.num_kv_heads,
        "head_dim": site.head_dim,
        "query_len": str(site.query_len),
        "kv_len": str(site.kv_len),
        "unsupported": site.unsupported or "",
        "ffn": [f"{f.form} {f.activation} {f.neurons}" for f in layer.ffn],
        "norms": [n.kind for n in layer.norms],
        "residual_adds": len(layer.residual_adds),
        "rotary": _rotary(layer),
        "cache": layer.cache.kind if layer.cache is not None else "",
    }


def _rotary(layer: Layer) -> str:
    """Return form, rotated channels and source of positions, as in half 16 arange."""
    if layer.rotary is None:
        return ""
    source = layer.rotary.positions.source if layer.rotary.positions else "unknown"
    return f"{layer.rotary.form} {layer.rotary.rotary_dim} {source}"


def ends_text(model: ModelGraph) -> str:
    """Return what the model begins and ends with, on one line; "" for neither."""
    parts = []
    if model.embedding is not None:
        parts.append(f"embedding {_sizes(model.embedding.weight)}")
    if (head := model.head) is not None:
        parts += [f"final {head.norm.kind} norm"] if head.norm is not None else []
        tied = "tied " if head.tied else ""
        parts.append(f"{tied}LM head {_sizes(head.weight)}")
    return ", ".join(parts)


def _sizes(node: fx.Node) -> str:
    return " x ".join(str(size) for size in shape_of(node) or ())
