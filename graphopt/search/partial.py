"""Results so far on disk, so that long work which is cut off goes on where it was."""

from __future__ import annotations

import json
import platform
from collections.abc import Callable, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from graphopt.codegen.cache import write_atomic
from graphopt.errors import ConfigError

Say = Callable[[str, int, int], None]  # what is done, how many are, of how many


class Partial:
    """A JSON file of finished parts; `keep` writes it whole, or not at all.

    ``settings`` are what the parts depend on. A file that was written with others is
    refused with a ConfigError that names the first setting which differs.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        # As JSON has it: tuples are lists there.
        self._settings: dict[str, Any] = json.loads(json.dumps(dict(settings)))
        self.parts: dict[str, Any] = self._read() if path.exists() else {}

    def keep(self, name: str, part: Any) -> None:
        """Add a part and write the file."""
        self.parts[name] = part
        whole = {"settings": self._settings, "parts": self.parts}
        write_atomic(self.path, (json.dumps(whole, indent=1) + "\n").encode())

    def remove(self) -> None:
        """Delete the file: the work is done."""
        self.path.unlink(missing_ok=True)

    def _read(self) -> dict[str, Any]:
        try:
            whole = json.loads(self.path.read_text(encoding="utf-8"))
            settings, parts = whole["settings"], whole["parts"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ConfigError(
                f"{self.path}: not a file of partial results ({error}); delete it to "
                "start anew"
            ) from None
        for key in sorted(settings.keys() | self._settings.keys()):
            old, new = settings.get(key), self._settings.get(key)
            if old != new:
                raise ConfigError(
                    f"{self.path}: was begun with {key} = {old!r}, now it is {new!r}; "
                    "run it as it was begun, or delete the file to start anew"
                )
        return dict(parts)


def threads_and_versions() -> dict[str, Any]:
    """Return versions and the kind of machine, on which times and rounding depend."""
    versions = {name: version(name) for name in ("graphopt", "torch", "transformers")}
    return versions | {
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}"
    }
