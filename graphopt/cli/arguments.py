"""Arguments that several commands share, so that they read alike everywhere."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import torch

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
Json = Annotated[bool, typer.Option("--json", help="Print one line of JSON.")]
Dtype = Annotated[
    str, typer.Option("--dtype", help="float32, bfloat16 or float16 for the weights.")
]


def dtype_of(name: str) -> torch.dtype:
    """Return the torch dtype of ``name``; ConfigError for any but the three."""
    import torch

    from graphopt.errors import ConfigError, did_you_mean

    names = ("float32", "bfloat16", "float16")
    if name not in names:
        raise ConfigError(f"--dtype {name}: unknown{did_you_mean(name, names)}")
    found: torch.dtype = getattr(torch, name)
    return found
