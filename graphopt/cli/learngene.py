"""``graphopt learngene``: auxiliary models by stages, and models made from them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from graphopt.cli.arguments import Dtype, Json, Model, Text, dtype_of, writable
from graphopt.cli.output import print_json, print_table
from graphopt.cli.progress import progress_bar
from graphopt.errors import ConfigError

if TYPE_CHECKING:
    from graphopt.learngene import Examples

app = typer.Typer(
    help="Models of any depth from one small set of layers (SWS).",
    no_args_is_help=True,
    rich_markup_mode="rich",
)
Out = Annotated[str, typer.Option(help="The folder to write the model to.")]
Stack = Annotated[
    str | None,
    typer.Option("--layers", help="Path of the list of layers; found if left out."),
]


@app.command()
def build(
    model: Model,
    out: Out,
    stages: Annotated[
        str | None,
        typer.Option(help="Layers of each stage, as 3,3,4,3,3; or give --count."),
    ] = None,
    count: Annotated[
        int | None, typer.Option(min=1, help="Stages, as long as one another.")
    ] = None,
    depth: Annotated[
        int | None,
        typer.Option(min=1, help="Layers of --count; the model's if left out."),
    ] = None,
    untied: Annotated[
        list[str] | None,
        typer.Option(help="Parameters that each layer keeps, as '*norm*'; repeatable."),
    ] = None,
    init: Annotated[
        str,
        typer.Option(
            help="Values of a stage: first or mean of its layers; random: all anew."
        ),
    ] = "first",
    seed: Annotated[int, typer.Option(help="Draws the values of random.")] = 0,
    layers: Stack = None,
    dtype: Dtype = "float32",
    as_json: Json = False,
) -> None:
    """Make the auxiliary model: layers that share their parameters by stages.

    Each shared tensor is written once; every command that takes a model reads the
    folder, and graphopt.learngene.load does.

    Example: graphopt learngene build smollm2 --count 5 --out auxiliary
    """
    from graphopt import learngene
    from graphopt.models import load

    path = writable(out)
    if (stages is None) == (count is None):
        raise ConfigError("give either --stages or --count")
    if depth is not None and count is None:
        raise ConfigError("--depth goes with --count; --stages say it themselves")
    loaded = load(model, dtype_of(dtype))
    if count is not None:
        known = len(learngene.find_stack(loaded.model, layers))
        sizes = learngene.even_stages(depth or known, count)
    else:
        sizes = _numbers("--stages", stages or "")
    options: dict[str, Any] = {"untied": untied or (), "init": init, "seed": seed}
    made = learngene.build(loaded.model, sizes, layers=layers, **options)
    _write(made, loaded, path, as_json, {"stages": sizes, "init": init, "seed": seed})


@app.command()
def distil(
    model: Model,
    out: Out,
    teacher: Annotated[
        str | None, typer.Option(help="Model whose outputs are learnt (any depth).")
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(help="safetensors: the model's inputs by name, and labels."),
    ] = None,
    text: Text = None,
    tokens: Annotated[
        int, typer.Option("--tokens", "-n", min=2, help="Tokens of an excerpt.")
    ] = 256,
    epochs: Annotated[int, typer.Option(min=1, help="Passes over the data.")] = 1,
    batch: Annotated[int, typer.Option(min=1, help="Examples of a step.")] = 64,
    rate: Annotated[float, typer.Option(help="Greatest learning rate (AdamW).")] = 5e-4,
    warmup: Annotated[float, typer.Option(min=0, help="Epochs up to that rate.")] = 0.0,
    alpha: Annotated[
        float, typer.Option(min=0, max=1, help="Share of the teacher; 0: labels only.")
    ] = 1.0,
    temperature: Annotated[
        float, typer.Option(help="Divides the logits of the teacher's part.")
    ] = 1.0,
    divide: Annotated[
        str | None,
        typer.Option(
            help="KL by elements (the paper's code) or by rows (the mean); rows for "
            "a text if left out, since vocabularies make elements' gradients tiny."
        ),
    ] = None,
    smoothing: Annotated[
        float, typer.Option(min=0, max=1, help="Smoothing of labels.")
    ] = 0.0,
    keep_every: Annotated[
        int, typer.Option(min=1, help="Steps between checkpoints.")
    ] = 200,
    seed: Annotated[int, typer.Option(help="Draws the order and the dropout.")] = 0,
    device: Annotated[
        str | None, typer.Option(help="cuda where there is one, else cpu.")
    ] = None,
    dtype: Dtype = "float32",
    as_json: Json = False,
) -> None:
    """Train a model on a teacher's outputs, on labels, or on both.

    A run that is cut off goes on from OUT.partial, bit for bit on the same machine; one
    with other settings is refused. Decoders learn from a text, others from --data.

    Example: graphopt learngene distil auxiliary --teacher smollm2 --out trained
    """
    from graphopt import learngene
    from graphopt.models import load

    path, wanted = writable(out), dtype_of(dtype)
    settings = learngene.TrainSettings(
        epochs=epochs,
        batch=batch,
        rate=rate,
        warmup=warmup,
        alpha=alpha,
        temperature=temperature,
        divide=divide or ("elements" if data else "rows"),  # type: ignore[arg-type]
        smoothing=smoothing,
        seed=seed,
        keep_every=keep_every,
    )
    loaded = load(model, wanted)
    examples = _examples(loaded, data, text, tokens)
    place = device or _device()
    student = loaded.model.to(place)
    master = load(teacher, wanted).model.to(place) if teacher else None
    partial = path.with_name(path.name + ".partial")
    with progress_bar() as say:
        training = learngene.Training(student, examples, settings, master, partial, say)
        losses = training.run()
    found = {"steps": len(losses), "first_loss": losses[0], "last_loss": losses[-1]}
    _write(student.cpu(), loaded, path, as_json, {**found, "seed": seed})


@app.command()
def expand(
    model: Model,
    out: Out,
    map: Annotated[
        str | None,
        typer.Option(help="Stage of each layer, as 0,0,1,1,2; or give --depth."),
    ] = None,
    depth: Annotated[
        int | None,
        typer.Option(min=1, help="Layers: as many of each stage, the first ones more."),
    ] = None,
    dtype: Dtype = "float32",
    as_json: Json = False,
) -> None:
    """Make a model of any depth from an auxiliary model; its layers share nothing.

    Example: graphopt learngene expand trained --depth 12 --out descendant
    """
    from graphopt import learngene
    from graphopt.models import load

    path = writable(out)
    loaded = load(model, dtype_of(dtype))
    numbers = None if map is None else _numbers("--map", map)
    made = learngene.expand(loaded.model, numbers, depth=depth)
    plan = learngene.plan_of(loaded.model)
    layers = len(learngene.find_stack(made, plan.layers if plan else None))
    _write(made, loaded, path, as_json, {"layers": layers})


def _numbers(option: str, text: str) -> list[int]:
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise ConfigError(f"{option} {text}: whole numbers with commas") from None


def _examples(loaded: Any, data: str | None, text: str | None, tokens: int) -> Examples:
    """Return what is learnt from; a text needs a tokenizer."""
    from graphopt.learngene import read_examples, text_examples
    from graphopt.search.texts import read_text

    if data is not None:
        if text is not None:
            raise ConfigError("give either --data or --text")
        return read_examples(data)
    if loaded.tokenizer is None:
        raise ConfigError(f"{loaded.name} has no tokenizer: give --data FILE")
    return text_examples(read_text(text).ids(loaded.tokenizer), tokens)


def _device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _write(
    made: Any, loaded: Any, path: Path, as_json: bool, facts: dict[str, Any]
) -> None:
    from graphopt.learngene import save, stored_parameters

    save(made, path)
    if loaded.tokenizer is not None:
        loaded.tokenizer.save_pretrained(path)
    size = sum(file.stat().st_size for file in path.glob("*.safetensors"))
    figures = {"parameters": stored_parameters(made), "bytes": size, **facts}
    if as_json:
        print_json({"written": str(path), **figures})
    else:
        print_table(f"written: {path}", ("figure", "value"), figures.items())
