"""Which scale a linear's activations get, and whether it has a shadow."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

from graphopt.calibration import Calibration, InputStatistics
from graphopt.calibration.names import find_name
from graphopt.ops.int8.codes import MOST


@dataclass(frozen=True)
class InputSetting:
    """``scale``: the value of one step; ``shadow``: float for what lies beyond."""

    scale: float
    shadow: bool


@dataclass(frozen=True)
class Settings:
    """`InputSetting` by the name of a linear's weight."""

    table: dict[str, InputSetting]

    def of(self, name: str) -> InputSetting | None:
        """Return a linear's setting by its weight's name; None for an unknown one."""
        found = find_name(name, self.table) if name else None
        return self.table[found] if found else None


def read_settings(path: str, prune: float) -> Settings:
    """Read a calibration and drop the shadow of the share ``prune`` of its linears.

    Those whose largest magnitude is the least multiple of the clipped one lose theirs
    (Xu et al. 2025, section 3.3). Raises ConfigError for a file that cannot be read.
    """
    file = Path(path).absolute()
    return _read(str(file), prune, file.stat().st_mtime_ns if file.exists() else 0)


@cache
def _read(path: str, prune: float, written: int) -> Settings:
    """``written``: when; a file that was written anew is read anew."""
    held = Calibration.read(path)
    order = sorted(held.inputs, key=lambda n: held.inputs[n].importance(held.trim))
    pruned = set(order[: round(prune * len(order))])
    return Settings(
        {
            name: _setting(found, held.trim, name not in pruned)
            for name, found in held.inputs.items()
        }
    )


def _setting(found: InputStatistics, trim: float, shadow: bool) -> InputSetting:
    most = found.clipped(trim) if shadow else found.maximum
    return InputSetting(most / MOST if most > 0 else 1.0, shadow)
