"""``graphopt diff``: what each pass changed, as a diff of normalised graph text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from graphopt.cli.arguments import Config, Json, Model, Tokens
from graphopt.cli.output import print_json, progress, stdout
from graphopt.errors import ConfigError, did_you_mean

if TYPE_CHECKING:
    from graphopt.pipeline import PassRecord
    from graphopt.report import CompileReport


def diff(
    model: Model,
    config: Config = None,
    only: Annotated[
        str | None, typer.Option("--pass", help="Show this pass alone.")
    ] = None,
    layer: Annotated[
        int | None, typer.Option("--layer", min=0, help="Show this layer alone.")
    ] = None,
    tokens: Tokens = 2048,
    as_json: Json = False,
) -> None:
    """Print a unified diff per pass; nothing where a pass changed nothing.

    Example: graphopt diff smollm2 -c examples/a-shape.toml --layer 0
    """
    from graphopt.cli.trace import trace
    from graphopt.diff import coloured
    from graphopt.models import load
    from graphopt.options import parse_options

    names = [p.name for p in parse_options({"config": config}).config.pipeline]
    if only is not None and only not in names:
        raise ConfigError(
            f"--pass {only}: not in the config{did_you_mean(only, names)}"
        )
    with progress(f"loading {model} and tracing it"):
        traced = trace(load(model).model, config, tokens)
    found = [
        {"graph": i, "pass": record.name, "diff": text}
        for i, report in enumerate(traced.reports)
        for record in report.records
        if only in (None, record.name) and (text := _diff(report, record, layer))
    ]
    if as_json:
        print_json(found)
        return
    for entry in found:
        stdout().print(f"graph {entry['graph']}, pass {entry['pass']}", style="bold")
        stdout().print(coloured(str(entry["diff"])), soft_wrap=True, end="")
    if not found:
        typer.echo("no pass changed the graph; graphopt explain says why", err=True)


def _diff(report: CompileReport, record: PassRecord, layer: int | None) -> str:
    """Return what a pass changed, in the whole graph or in one layer of it."""
    from graphopt.diff import layer_text, unified_diff

    if layer is None:
        return unified_diff(record.before, record.after)
    count = len(report.structure)
    if layer >= count:
        raise ConfigError(f"--layer {layer}: the graph has {count} layers, from 0")
    return unified_diff(
        layer_text(record.before, layer), layer_text(record.after, layer)
    )
