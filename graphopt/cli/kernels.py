"""Emit the kernels of rewritten sites without running them, for ``explain --code``."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path
from typing import Any

from graphopt.codegen.cache import write_source
from graphopt.codegen.cpp import attention, select, visit
from graphopt.codegen.triton.emit import emit as emit_triton
from graphopt.codegen.triton.spec import AttentionSpec
from graphopt.ir.attention import AttentionSite
from graphopt.ir.match import argument, value_of

# A static pattern's kernel, or "visit-list": one for all visit lists.
Kernel = AttentionSpec | str


def kernel_of(site: AttentionSite) -> Kernel:
    """Return which kernel a rewritten site runs."""
    if site.pattern == "visit-list":
        return site.pattern
    tables: Any = (argument(site.node, 5, "sink"), argument(site.node, 6, "window"))
    return AttentionSpec(
        pattern=site.pattern,
        dtype=value_of(site.query).dtype,
        head_dim=site.head_dim,
        value_dim=int(value_of(site.value).shape[-1]),
        group=site.num_heads // site.num_kv_heads,
        has_key_mask=site.key_mask is not None,
        has_softcap=site.softcap != 0.0,
        per_head=any(len(table) > 1 for table in tables),
    )


def emit_kernels(kernels: Collection[Kernel], device: str) -> list[Path]:
    """Write each kernel's source for ``device`` (cpu or cuda); return the paths."""
    specs = [k for k in kernels if isinstance(k, AttentionSpec)]
    if device != "cpu":
        ordered = sorted(specs, key=lambda spec: spec.name)
        return [write_source(spec.name, ".py", emit_triton(spec)) for spec in ordered]
    sources = {
        f"attention_{p.replace('-', '_')}": attention.emit(p)
        for p in sorted({spec.pattern for spec in specs})
    }
    if len(specs) < len(kernels):
        sources["select_vertical_slash"] = select.emit()
        sources["visit_attention"] = visit.emit()
    return [write_source(stem, ".cpp", text) for stem, text in sources.items()]
