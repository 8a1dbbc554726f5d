"""The table of patterns and budgets that the fidelity benchmark measures."""

from __future__ import annotations

import json
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError

from graphopt.config import load_config
from graphopt.errors import ConfigError

PATTERNS = Path(__file__).parent / "patterns.toml"


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One row: a pattern with its sizes, and what is measured of it."""

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    pattern: str
    options: dict[str, Any] = field(default_factory=dict)
    default: bool = False
    baselines: bool = False
    retrieval: Literal["alone", "with-baselines"] | None = None
    quick: bool = False

    def config(self) -> dict[str, Any]:
        """Return the pass config; forced, or short prompts would stay dense."""
        own = {"name": "sparse-attention", "pattern": self.pattern, "force": True}
        return {"defaults": False, "pass": [{**own, **self.options}]}

    @property
    def label(self) -> str:
        """Return a short name: the pattern and the sizes that are not defaults."""
        sizes = ",".join(f"{k}={v}" for k, v in self.options.items())
        return f"{self.pattern}{{{sizes}}}" if sizes else self.pattern


def read_settings(path: Path = PATTERNS) -> list[Setting]:
    """Read and check the table; ConfigError for a row that the pass refuses."""
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
        rows = TypeAdapter(list[Setting]).validate_json(
            json.dumps(data.get("row", []), default=str)
        )
    except (OSError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}") from None
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"]))
        raise ConfigError(f"{path}: row.{place}: {first['msg']}") from None
    for index, row in enumerate(rows):
        try:
            load_config(row.config())
        except ConfigError as error:
            raise ConfigError(f"{path}: row {index}, {row.label}: {error}") from None
    labels = [row.label for row in rows]
    for label in labels:
        if labels.count(label) > 1:
            raise ConfigError(f"{path}: two rows are '{label}'; take one out")
    return rows
