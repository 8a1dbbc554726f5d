"""Models with tied layers on disk: each shared tensor once.

A transformers model is saved and loaded by transformers, in its own layout: its
``config.json`` has the stages under ``learngene``, and ``model.safetensors`` has no
tensor twice. Any other module is a folder with ``model.safetensors`` (every parameter
and buffer under its first name) and ``learngene.json`` (the plan).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from graphopt.errors import ModelError
from graphopt.learngene.tying import is_transformers, plan_of, tie

_WEIGHTS, _PLAN = "model.safetensors", "learngene.json"


def save(model: nn.Module, folder: str | Path) -> Path:
    """Write ``model``, tied or not, to ``folder`` and return it."""
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    if is_transformers(model):
        model.save_pretrained(path)  # type: ignore[operator]
        return path
    save_file(unique_state(model), path / _WEIGHTS, metadata={"format": "pt"})
    plan = plan_of(model)
    text = json.dumps(plan and plan.as_dict(), indent=1)
    (path / _PLAN).write_text(text + "\n", encoding="utf-8")
    return path


def load(
    folder: str | Path,
    model: nn.Module | None = None,
    dtype: torch.dtype = torch.float32,
) -> Any:
    """Return the model of ``folder`` in eval mode, its layers tied as they were saved.

    ``model`` is a module of the saved structure that is tied and filled, for those that
    are no transformers models. Raises ModelError for what cannot be read.
    """
    if model is None:
        from graphopt.models import load as load_transformers

        return load_transformers(str(folder), dtype).model
    path = Path(folder)
    try:
        plain = json.loads((path / _PLAN).read_text(encoding="utf-8"))
        given = load_file(path / _WEIGHTS)
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: no saved module: {error}") from None
    if plain is not None:
        tie(model, plain["stages"], untied=plain["untied"], layers=plain["layers"])
    load_unique(model, given, str(path))
    return model.eval()


def unique_state(model: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and saved buffers, each tensor once."""
    kept = model.state_dict(keep_vars=True)
    first: dict[int, str] = {}
    for name, value in kept.items():
        first.setdefault(id(value), name)
    return {name: kept[name].detach().contiguous() for name in first.values()}


def load_unique(model: nn.Module, given: dict[str, Tensor], origin: str) -> None:
    """Fill ``model`` from `unique_state`; ModelError where names or shapes differ."""
    own = unique_state(model)
    if wrong := sorted(own.keys() ^ given.keys()):
        raise ModelError(f"{origin}: these tensors do not fit: {', '.join(wrong[:5])}")
    with torch.no_grad():
        for name, value in own.items():
            if value.shape != given[name].shape:
                raise ModelError(f"{origin}: {name} is {tuple(given[name].shape)}")
            value.copy_(given[name])
