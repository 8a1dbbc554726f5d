"""Graph diffs of a model under a pass config, as text for golden files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import fx

from graphopt.backend import rewrite
from graphopt.diff import layer_text, unified_diff
from graphopt.ir.copying import copy_module
from graphopt.options import BackendOptions, parse_options
from graphopt.pipeline import PassRecord
from graphopt.remarks import Remark
from graphopt.report import CompileReport


def reports_of(
    model: torch.nn.Module,
    config: str | Path | Mapping[str, Any] | None,
    inputs: Mapping[str, Any],
    *,
    dynamic: bool | None = True,
) -> list[CompileReport]:
    """Capture ``model(**inputs)``, run the passes and return a report for each graph.

    The model computes once, uncompiled and unrewritten. Raises ConfigError for a bad
    config.
    """
    reports: list[CompileReport] = []
    backend = _recorder(parse_options({"config": config}), reports)
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend, dynamic=dynamic)(**inputs)
    torch._dynamo.reset()
    return reports


def _recorder(
    options: BackendOptions, reports: list[CompileReport]
) -> Callable[[fx.GraphModule, list[Any]], Callable[..., Any]]:
    def backend(gm: fx.GraphModule, examples: list[Any]) -> Callable[..., Any]:
        original = copy_module(gm)
        reports.append(rewrite(gm, options)[0])
        return original.forward

    return backend


def diff_text(
    model: torch.nn.Module,
    config: str | Path | Mapping[str, Any] | None,
    inputs: Mapping[str, Any],
    *,
    layer: int | None = None,
    dynamic: bool | None = True,
) -> str:
    """Return remarks and unified diff of every pass on every graph of one call.

    ``layer`` keeps the diffs to the lines of one layer; remarks are always all.
    """
    parts: list[str] = []
    for number, report in enumerate(reports_of(model, config, inputs, dynamic=dynamic)):
        parts.append(f"graph {number}: {report.kind}")
        parts += [f"# {_remark(r)}" for r in report.remarks]
        for record in report.records:
            parts.append(f"pass {record.text}")
            parts += [f"# {_remark(r)}" for r in record.remarks]
            parts += _diff(record, layer)
    return "\n".join(parts) + "\n"


def _remark(remark: Remark) -> str:
    return f"{remark.site}: {remark.kind} [{remark.code}] {remark.message}"


def _diff(record: PassRecord, layer: int | None) -> list[str]:
    before, after = record.before, record.after
    if layer is not None:
        before, after = layer_text(before, layer), layer_text(after, layer)
    text = unified_diff(before, after)
    return [text] if text else []
