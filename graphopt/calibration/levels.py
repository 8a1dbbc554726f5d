"""How much of each linear's input to leave out: TEAL's levels, block by block.

A level is the share of a linear's inputs that count as zero. Linears differ in what
that costs, so a layer that may leave out a share of its weights leaves out more where
it does less harm (Liu et al. 2024, TEAL, section 5.4 and algorithm 1).
"""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from graphopt.calibration.names import find_name
from graphopt.errors import ConfigError

_RULE = "graphopt levels MODEL --thresholds FILE"


@dataclass
class Levels:
    """``table``: the level of each linear, by its weight's name.

    ``sparsity``: the share of each layer's weights that is left out by all together.
    """

    sparsity: float
    table: dict[str, float] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)

    def of(self, name: str) -> float | None:
        """Return the level of the linear with the weight ``name``; None for none."""
        found = find_name(name, self.table)
        return None if found is None else self.table[found]

    def write(self, path: str | Path) -> Path:
        """Write a TOML file and return its path."""
        lines = [
            "# The share of each linear's inputs that count as zero, by its weight.",
            f"sparsity = {self.sparsity}",
            *("", "[about]"),
            *(f"{key} = {json.dumps(value)}" for key, value in self.about.items()),
            *("", "[levels]"),
            *(f"{json.dumps(key)} = {x:.4f}" for key, x in self.table.items()),
        ]
        Path(path).write_text("\n".join(lines) + "\n", encoding="utf-8")
        return Path(path)

    @staticmethod
    def read(path: str | Path) -> Levels:
        """Read what `write` wrote; ConfigError for any other file."""
        try:
            facts = tomllib.loads(Path(path).read_text(encoding="utf-8"))
            table = {str(k): float(v) for k, v in facts["levels"].items()}
            return Levels(float(facts["sparsity"]), table, facts.get("about", {}))
        except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
            raise ConfigError(
                f"{path}: no levels that can be read ({error}); write them by {_RULE}"
            ) from None
