"""What ranks have to have in common before they run one model."""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from graphopt import __version__

_SMALL = 1 << 16  # elements of a parameter whose values are compared too


def of_installation() -> dict[str, str]:
    """Return the versions of what compiles the model."""
    return {
        "graphopt": __version__,
        "torch": torch.__version__,
        "transformers": version("transformers"),
    }


def of_config(config: Any) -> dict[str, str]:
    """Return the pass config as one line, and a hash of the files that it names.

    ConfigError for a bad one.
    """
    from graphopt.config import load_config

    found = load_config(config)
    values = [v for item in found.pipeline for v in item.options().values()]
    files = [Path(v) for v in values if isinstance(v, str) and Path(v).is_file()]
    content = _hash(b"".join(path.read_bytes() for path in files))
    return {"the config": repr(found.text()), "the config's files": content}


def of_architecture(config: Any) -> dict[str, str]:
    """Return a hash of a transformers configuration."""
    text = config.to_json_string(use_diff=False)
    return {"the model's configuration": _hash(text.encode())}


def of_weights(model: torch.nn.Module) -> dict[str, str]:
    """Return a hash of the parameters: names, whole shapes, dtypes, small ones' values.

    Small ones that every rank has whole, as norms: other weights of the same shapes
    are told from these by them.
    """
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        digest.update(f"{name} {tuple(weight.shape)} {weight.dtype};".encode())
        if not hasattr(weight, "placements") and weight.numel() <= _SMALL:
            # A copy: memory that NumPy has seen cannot be given up any more.
            values = weight.detach().to("cpu", torch.float32, copy=True)
            digest.update(values.numpy().tobytes())
    return {"the model's parameters": digest.hexdigest()[:12]}


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]
