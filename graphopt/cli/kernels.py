"""Emit the kernels of rewritten sites without running them, for ``explain --code``."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from graphopt.codegen.cache import write_source
from graphopt.codegen.cpp import (
    attention,
    page_attention,
    pages,
    select,
    select_blocks,
    visit,
)
from graphopt.codegen.triton.emit import emit as emit_triton
from graphopt.codegen.triton.spec import VISIT_LIST, AttentionSpec
from graphopt.ir.attention.site import AttentionSite
from graphopt.ir.match import argument, value_of


def kernel_spec(site: AttentionSite) -> AttentionSpec:
    """Return which kernel a rewritten site runs."""
    is_visit = site.pattern == VISIT_LIST
    places = {"dense_rows": 8} if is_visit else {"sink": 5, "window": 6}
    tables: list[Any] = [argument(site.node, i, name) for name, i in places.items()]
    has_blocks = is_visit and argument(site.node, 13, "key_blocks") is not None
    block: Any = argument(site.node, 16, "block") if has_blocks else 0
    return AttentionSpec(
        pattern=site.pattern,
        dtype=value_of(site.query).dtype,
        head_dim=site.head_dim,
        value_dim=int(value_of(site.value).shape[-1]),
        group=site.num_heads // site.num_kv_heads,
        has_key_mask=site.key_mask is not None,
        has_softcap=site.softcap != 0.0,
        per_head=any(len(set(table)) > 1 for table in tables),
        block=block,
    )


def emit_kernels(
    specs: Iterable[AttentionSpec], device: str, reads_pages: bool = False
) -> list[Path]:
    """Write each kernel's source for ``device`` (cpu or cuda); return the paths.

    ``reads_pages``: those of paged keys and values too (C++; on CUDA plain ATen runs).
    """
    specs = sorted(set(specs), key=lambda spec: spec.name)
    if device != "cpu":
        return [write_source(spec.name, ".py", emit_triton(spec)) for spec in specs]
    sources: dict[str, str] = {}
    if any(spec.block for spec in specs):
        sources["select_blocks"] = select_blocks.emit()
    for pattern in sorted({spec.pattern for spec in specs}):
        if pattern == VISIT_LIST:
            sources["select_vertical_slash"] = select.emit()
            sources["visit_attention"] = visit.emit()
        else:
            sources[f"attention_{pattern.replace('-', '_')}"] = attention.emit(pattern)
    if reads_pages:
        sources["append_pages"] = pages.emit_append()
        sources["page_attention"] = page_attention.emit()
    return [write_source(stem, ".cpp", text) for stem, text in sources.items()]
