"""Arguments that several commands share, so that they read alike everywhere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import torch

    from graphopt.models import LoadedModel

Model = Annotated[
    str,
    typer.Argument(
        metavar="MODEL",
        help="Alias (smollm2), model directory, GGUF file or hub id.",
    ),
]
Config = Annotated[
    str | None,
    typer.Option(
        "--config",
        "-c",
        help="Pass config: a TOML file or one line such as "
        "'sparse-attention{window=1024}'. The default passes when left out.",
    ),
]
Tokens = Annotated[
    int,
    typer.Option("--tokens", "-n", min=2, help="Length of the prompt, in tokens."),
]
Text = Annotated[
    str | None,
    typer.Option(
        "--text", help="A text file; CPython's language reference when left out."
    ),
]
Json = Annotated[bool, typer.Option("--json", help="Print one line of JSON.")]
Dtype = Annotated[
    str, typer.Option("--dtype", help="float32, bfloat16 or float16 for the weights.")
]


def writable(out: str) -> Path:
    """Return the path of ``--out``; ConfigError where its folder is missing."""
    from graphopt.errors import ConfigError

    path = Path(out)
    if not path.absolute().parent.is_dir():
        raise ConfigError(f"--out {path}: there is no folder {path.parent}")
    return path


def dtype_of(name: str) -> torch.dtype:
    """Return the torch dtype of ``name``; ConfigError for any but the three."""
    import torch

    from graphopt.errors import ConfigError, did_you_mean

    names = ("float32", "bfloat16", "float16")
    if name not in names:
        raise ConfigError(f"--dtype {name}: unknown{did_you_mean(name, names)}")
    found: torch.dtype = getattr(torch, name)
    return found


def load_with_text(model: str, dtype: str) -> LoadedModel:
    """Load a model that is to read text; ConfigError for one without a tokenizer."""
    from graphopt.errors import ConfigError

    wanted = dtype_of(dtype)
    from graphopt.models import load

    loaded = load(model, wanted)
    if loaded.tokenizer is None:
        raise ConfigError(f"{model}: no tokenizer beside the model, so no text to read")
    return loaded
