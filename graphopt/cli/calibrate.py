"""``graphopt calibrate``: the ranges of a model's activations on real text."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graphopt.cli.arguments import Dtype, Json, Model, Text, load_with_text, writable
from graphopt.cli.output import print_json, print_table
from graphopt.cli.progress import progress_bar

if TYPE_CHECKING:
    from graphopt.calibration import Calibration

_SHOWN = 10


def calibrate(
    model: Model,
    text: Text = None,
    tokens: Annotated[
        int, typer.Option("--tokens", "-n", min=16, help="Tokens of an excerpt.")
    ] = 512,
    samples: Annotated[
        int, typer.Option(min=1, help="Excerpts, drawn by --seed.")
    ] = 16,
    trim: Annotated[
        float,
        typer.Option(
            min=0.0, max=0.1, help="Share of values that the clipped range leaves out."
        ),
    ] = 0.003,
    out: Annotated[
        str, typer.Option(help="NAME.toml to write, with NAME.safetensors beside it.")
    ] = "calibration.toml",
    seed: Annotated[int, typer.Option(help="Draws the excerpts.")] = 0,
    dtype: Dtype = "float32",
    as_json: Json = False,
) -> None:
    """Measure what every linear of a model is given, and write it to a file.

    The passes shadow-outlier (scales, outliers) and neuron-mask (thresholds of teal and
    cats) read it. The model runs uncompiled, over each excerpt twice.

    Example: graphopt calibrate smollm2 --out smollm2.toml
    """
    from graphopt.calibration.observe import calibrate as observe
    from graphopt.search.texts import read_text

    source = read_text(text)
    path = writable(out)
    loaded = load_with_text(model, dtype)
    texts = [source.excerpt(loaded.tokenizer, tokens, seed + i) for i in range(samples)]
    with progress_bar() as say:
        found = observe(loaded.model, texts, trim=trim, say=say)
    found.about = {
        "model": model,
        "text": source.origin,
        "digest": source.digest,
        "tokens": tokens,
        "samples": samples,
        "seed": seed,
        "dtype": dtype,
    }
    _print(found, found.write(path), as_json)


def _print(found: Calibration, paths: tuple[Path, Path], as_json: bool) -> None:
    rows = []
    for name, held in found.inputs.items():
        clipped, importance = held.clipped(found.trim), held.importance(found.trim)
        channels = int((held.outliers > 0).sum())
        rows.append((name, clipped, held.maximum, importance, channels))
    rows.sort(key=lambda row: -row[3])
    if as_json:
        facts = {"written": [str(p) for p in paths], "linears": len(rows)}
        print_json({**facts, "gates": len(found.gates), "most_important": rows[0][0]})
        return
    columns = ("weight", "clipped", "maximum", "importance", "outlier channels")
    title = f"written: {paths[0]}; the most important of {len(rows)}"
    print_table(title, columns, rows[:_SHOWN])
