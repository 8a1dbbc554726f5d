"""``graphopt search``: a pattern, or a gate, for every head of a model."""

from __future__ import annotations

import shlex
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphopt.cli.arguments import Dtype, Json, Model, Text, load_with_text, writable
from graphopt.cli.output import print_json, print_table
from graphopt.cli.progress import progress_bar
from graphopt.errors import ConfigError

if TYPE_CHECKING:
    from graphopt.search.job import Found


def search(
    model: Model,
    text: Text = None,
    tokens: Annotated[
        int, typer.Option("--tokens", "-n", min=128, help="Tokens of it to attend to.")
    ] = 8192,
    out: Annotated[
        str | None,
        typer.Option(help="The table to write: heads.toml, with --gates gates.tsv."),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            help="Time of each pattern: a share of dense attention's (0.35 when left "
            "out), or that of a-shape:SINK:WINDOW."
        ),
    ] = None,
    sizes: Annotated[
        str | None,
        typer.Option(help="Take the sizes from a table written before; times nothing."),
    ] = None,
    seed: Annotated[int, typer.Option(help="Draws the excerpt, or the passkeys.")] = 0,
    gates: Annotated[
        bool, typer.Option("--gates", help="Train DuoAttention's gates instead.")
    ] = False,
    steps: Annotated[int, typer.Option(min=5, help="Steps of --gates.")] = 100,
    context: Annotated[
        int, typer.Option(min=128, help="Tokens of a sample of --gates.")
    ] = 1024,
    batch: Annotated[int, typer.Option(min=1, help="Samples a step of --gates.")] = 1,
    dtype: Dtype = "float32",
    as_json: Json = False,
) -> None:
    """Choose a pattern for every head by measurement, and write a heads table.

    Every candidate gets the size at which it takes the budget's time on this machine;
    each head then gets the one whose output is nearest to dense attention's. With
    --gates, gates of KV heads are trained on hidden passkeys instead; the lowest mark
    streaming heads. The option ``table`` of the pass sparse-attention reads both. What
    was finished when a run is cut off is kept beside the table (.partial), and a rerun
    goes on from it.

    Example: graphopt search smollm2 --tokens 8192 --out heads.toml
    """
    from graphopt.search.job import HeadJob, find_heads
    from graphopt.search.texts import read_text

    if gates and (budget or sizes):
        raise ConfigError("--gates times nothing: leave --budget and --sizes out")
    source = read_text(text)
    path = writable(out or ("gates.tsv" if gates else "heads.toml"))
    loaded = load_with_text(model, dtype)
    if gates:
        sizes_of_training = {"steps": steps, "context": context, "batch": batch}
        _train(loaded, source, path, {**sizes_of_training, "seed": seed}, as_json)
        return
    words = ["graphopt", "search", model, *(["--text", text] if text else [])]
    command = shlex.join([*words, "--tokens", str(tokens), "--seed", str(seed)])
    job = HeadJob(command, source, tokens, seed, budget, sizes, dtype)
    with progress_bar() as say:
        found = find_heads(loaded, job, path, say)
    _print(path, found, as_json)


def _train(
    loaded: Any, source: Any, path: Path, sizes: dict[str, int], as_json: bool
) -> None:
    from graphopt.search.gates import GateSettings, find_gates

    with progress_bar() as say:
        gates, losses = find_gates(loaded, source, GateSettings(**sizes), path, say)
    facts = {
        "table": str(path),
        "first_loss": losses[0],
        "last_loss": losses[-1],
        "mean_gate": float(gates.mean()),
        "gates_under_half": int((gates < 0.5).sum()),
        "gates": gates.numel(),
    }
    if as_json:
        print_json(facts)
    else:
        print_table("gates", ("figure", "value"), facts.items())


def _print(path: Path, found: Found, as_json: bool) -> None:
    counts = Counter(name for name, _ in found.heads)
    if as_json:
        mean = sum(error for _, error in found.heads) / len(found.heads)
        facts = {"table": str(path), "heads": counts, "mean_error": mean}
        print_json({**facts, "left_out": found.left_out})
        return
    rows = []
    for name, count in counts.most_common():
        errors = [error for other, error in found.heads if other == name]
        rows.append((name, count, sum(errors) / count, max(errors)))
    columns = ("pattern", "heads", "mean error", "worst error")
    print_table(f"written: {path}", columns, rows)
    if found.left_out:
        print_table("left out", ("pattern", "reason"), found.left_out.items())
