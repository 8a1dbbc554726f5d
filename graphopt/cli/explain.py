"""``graphopt explain``: the structure found, a remark per site, the cost predicted."""

from __future__ import annotations

import re
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
    no_cache: Annotated[
        bool, typer.Option("--no-cache", help="A prefill that keeps no keys.")
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
        traced = trace(loaded.model, config, tokens, use_cache=not no_cache)
    wanted = (traced.kernels, traced.device, traced.reads_pages)
    paths = emit_kernels(*wanted) if code else []
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
        {**report.as_dict(), "cost": cost, "layers": layers}
        for report, cost, layers in zip(
            traced.reports, traced.costs, traced.layers, strict=True
        )
    ]
    return {"tokens": tokens, "graphs": graphs, "kernels": kernels}


def _print_graph(traced: Traced, index: int, tokens: int) -> None:
    report, cost = traced.reports[index], traced.costs[index]
    title = f"graph {index}: {report.kind}; passes: {report.config or 'none'}"
    _print_rows(title, merged(report.structure, "layer"))
    if report.ends:
        stdout().print(report.ends, soft_wrap=True)
    names = ("pass_name", "site", "kind", "code", "message")
    remarks = [{n: getattr(r, n) for n in names} for r in report.all_remarks()]
    _print_rows("remarks", merged(remarks, "site"))
    if cost:
        what = "a step" if report.kind == "decode" else "attention"
        _print_cost(f"{what} at {tokens} tokens, predicted; each", cost, "site")
    if layers := traced.layers[index]:
        title = f"prefill of {tokens} tokens, predicted; each layer, attention included"
        _print_cost(title, layers, "layer")


def _print_cost(title: str, rows: list[dict[str, Any]], name: str) -> None:
    keys = [key for key in rows[0] if isinstance(rows[0][key], float)]
    total = {name: "all", **{key: sum(row[key] for row in rows) for key in keys}}
    _print_rows(title, [*merged(rows, name), *([total] if len(rows) > 1 else [])])


def merged(rows: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    """Join rows that differ only in the number in column ``name``: ``0-29``."""
    groups: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        # A number elsewhere in the row is a difference, the one in ``name`` is not.
        place = re.sub(r"\d+", "#", str(row[name]))
        groups.setdefault(repr({**row, name: place}), []).append(row)
    return [{**g[0], name: _span([str(r[name]) for r in g])} for g in groups.values()]


def _span(places: list[str]) -> str:
    numbers = [int(found.group()) for p in places if (found := re.search(r"\d+", p))]
    if len(numbers) < 2:
        return places[0]
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1].append(number)
        else:
            parts.append([number])
    spans = [str(p[0]) if len(p) == 1 else f"{p[0]}-{p[-1]}" for p in parts]
    return re.sub(r"\d+", ",".join(spans), places[0], count=1)


def _print_rows(title: str, rows: list[dict[str, Any]]) -> None:
    columns = list(dict.fromkeys(key for row in rows for key in row))
    print_table(title, columns, [[row.get(c) for c in columns] for row in rows])
