"""Emit the kernels of rewritten sites without running them, for ``explain --code``."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from graphopt.codegen.cache import write_source
from graphopt.codegen.cpp.attention import emit as emit_cpp
from graphopt.codegen.triton.emit import emit as emit_triton
from graphopt.codegen.triton.spec import AttentionSpec
from graphopt.ir.attention import AttentionSite
from graphopt.ir.match import argument, value_of


def kernel_spec(site: AttentionSite) -> AttentionSpec:
    """Return which kernel a rewritten site runs."""
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


def emit_kernels(specs: Iterable[AttentionSpec], device: str) -> list[Path]:
    """Write each kernel's source for ``device`` (cpu or cuda); return the paths."""
    if device == "cpu":
        patterns = sorted({spec.pattern for spec in specs})
        stems = [(f"attention_{p.replace('-', '_')}", p) for p in patterns]
        return [write_source(stem, ".cpp", emit_cpp(p)) for stem, p in stems]
    ordered = sorted(set(specs), key=lambda spec: spec.name)
    return [write_source(spec.name, ".py", emit_triton(spec)) for spec in ordered]
