"""A training on disk, whole or not at all, so that it goes on bit for bit."""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from graphopt.codegen.cache import write_atomic
from graphopt.errors import ConfigError


class Checkpoint:
    """The file of a training with ``settings``; one of others is refused.

    Raises ConfigError that names the first setting which differs, or says that the
    file cannot be read.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self._settings: dict[str, Any] = json.loads(json.dumps(dict(settings)))

    def keep(self, state: Mapping[str, Any]) -> None:
        """Write the state of a training: tensors and plain data."""
        buffer = io.BytesIO()
        torch.save({"settings": self._settings, "state": dict(state)}, buffer)
        write_atomic(self.path, buffer.getvalue())

    def read(self) -> dict[str, Any] | None:
        """Return the state that was kept, or None."""
        if not self.path.exists():
            return None
        try:
            whole = torch.load(self.path, map_location="cpu", weights_only=True)
            settings, state = whole["settings"], whole["state"]
        except Exception as error:
            raise ConfigError(
                f"{self.path}: no checkpoint ({error}); delete it to start anew"
            ) from None
        for key in sorted(settings.keys() | self._settings.keys()):
            old, new = settings.get(key), self._settings.get(key)
            if old != new:
                raise ConfigError(
                    f"{self.path}: was begun with {key} = {old!r}, now it is {new!r}; "
                    "run it as it was begun, or delete the file to start anew"
                )
        return dict(state)

    def remove(self) -> None:
        """Delete the file: the work is done."""
        self.path.unlink(missing_ok=True)
