"""The structure that raise found, as plain data for reports and ``explain``."""

from __future__ import annotations

from typing import Any

from graphopt.ir.model_graph import Layer, ModelGraph


def structure_rows(model: ModelGraph) -> list[dict[str, Any]]:
    """Return one row a layer: heads, pattern, FFN and norms."""
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
    }
