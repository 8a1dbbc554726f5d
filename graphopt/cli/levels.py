"""``graphopt levels``: how much of each linear's input teal leaves out."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from graphopt.cli.arguments import Dtype, Json, Model, Text, load_with_text, writable
from graphopt.cli.output import print_json, print_table
from graphopt.cli.progress import progress_bar

if TYPE_CHECKING:
    from graphopt.calibration.levels import Levels


def levels(
    model: Model,
    thresholds: Annotated[str, typer.Option(help="What `graphopt calibrate` wrote.")],
    sparsity: Annotated[
        float,
        typer.Option(min=0.0, max=0.9, help="Share of each layer's weights left out."),
    ] = 0.5,
    text: Text = None,
    tokens: Annotated[
        int, typer.Option("--tokens", "-n", min=16, help="Tokens of an excerpt.")
    ] = 256,
    samples: Annotated[int, typer.Option(min=1, help="Excerpts, drawn by --seed.")] = 2,
    step: Annotated[
        float,
        typer.Option(min=0.001, max=0.5, help="Share of a layer decided on at a time."),
    ] = 0.025,
    out: Annotated[str, typer.Option(help="The TOML file to write.")] = "levels.toml",
    seed: Annotated[int, typer.Option(help="Draws the excerpts.")] = 1,
    dtype: Dtype = "float32",
    as_json: Json = False,
) -> None:
    """Choose a sparsity for each linear, layer by layer, and write them to a file.

    The pass neuron-mask with method teal reads it (levels). Each layer runs some
    hundred times on the excerpts, uncompiled.

    Example: graphopt levels smollm2 --thresholds smollm2.toml --out levels.toml
    """
    from graphopt.calibration import Calibration
    from graphopt.search.levels import find_levels
    from graphopt.search.texts import read_text

    source, held = read_text(text), Calibration.read(thresholds)
    path = writable(out)
    loaded = load_with_text(model, dtype)
    import torch

    texts = [source.excerpt(loaded.tokenizer, tokens, seed + i) for i in range(samples)]
    with progress_bar() as say:
        found = find_levels(
            loaded.model, torch.cat(texts), held, sparsity, step=step, say=say
        )
    found.about = {"model": model, "thresholds": thresholds, "text": source.origin}
    found.about |= {"tokens": tokens, "samples": samples, "seed": seed, "step": step}
    _print(found, found.write(path), as_json)


def _print(found: Levels, path: Path, as_json: bool) -> None:
    if as_json:
        print_json({"written": str(path), "linears": len(found.table)})
        return
    kinds: dict[str, list[float]] = {}
    for name, level in found.table.items():
        kinds.setdefault(name.split(".")[-2], []).append(level)
    rows = [(k, min(v), sum(v) / len(v), max(v)) for k, v in kinds.items()]
    columns = ("linear", "least", "mean", "most")
    print_table(f"written: {path}; levels by kind", columns, rows)
