"""``graphopt explain``: the structure found, a remark per site, the cost predicted."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphopt.cli.arguments import Config, Dtype, Json, Model, Tokens, dtype_of
from graphopt.cli.output import print_json, print_table, progress, stdout

if TYPE_CHECKING:
    from graphopt.cli.trace import Traced


def explain(
    model: Model,
    config: Config = None,
    tokens: Tokens = 2048,
    code: Annotated[
        bool, typer.Option("--code", help="Emit the kernels and print their paths.")
    ] = False,
    dtype: Dtype = "float32",
    as_json: Json = False,
) -> None:
    """Show what graphopt finds in a model and does to it, for a prompt of N tokens.

    Nothing is computed: sizes go through the model, numbers do not.

    Example: graphopt explain smollm2 -c examples/a-shape.toml -n 8192 --code
    """
    from graphopt.cli.kernels import emit_kernels
    from graphopt.cli.trace import trace
    from graphopt.models import load
    from graphopt.options import parse_options

    parse_options({"config": config})
    with progress(f"loading {model} and tracing it at {tokens} tokens"):
        loaded = load(model, dtype_of(dtype))
        traced = trace(loaded.model, config, tokens)
    paths = emit_kernels(traced.specs, traced.device) if code else []
    kernels = [str(path) for path in paths]
    if as_json:
        print_json(_as_dict(traced, tokens, kernels))
        return
    for index, _ in enumerate(traced.reports):
        _print_graph(traced, index, tokens)
    for path in kernels:
        stdout().print(f"kernel: {path}", soft_wrap=True)


def _as_dict(traced: Traced, tokens: int, kernels: list[str]) -> dict[str, Any]:
    graphs = [
        {**report.as_dict(), "cost": cost}
        for report, cost in zip(traced.reports, traced.costs, strict=True)
    ]
    return {"tokens": tokens, "graphs": graphs, "kernels": kernels}


def _print_graph(traced: Traced, index: int, tokens: int) -> None:
    report, cost = traced.reports[index], traced.costs[index]
    title = f"graph {index}: {report.kind}; passes: {report.config or 'none'}"
    _print_rows(title, report.structure)
    rows = [
        (r.pass_name, r.site, r.kind, r.code, r.message) for r in report.all_remarks()
    ]
    print_table("remarks", ("pass", "site", "kind", "code", "message"), rows)
    if cost:
        _print_rows(f"attention at {tokens} tokens, predicted", [*cost, _total(cost)])


def _total(cost: list[dict[str, Any]]) -> dict[str, Any]:
    keys = [key for key in cost[0] if isinstance(cost[0][key], float)]
    return {"site": "all", **{key: sum(row[key] for row in cost) for key in keys}}


def _print_rows(title: str, rows: list[dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    print_table(title, columns, [[row.get(c) for c in columns] for row in rows])
