"""The heads table that a search writes, and the sizes it holds for a rerun."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from graphopt.errors import ConfigError

Errors = Mapping[str, Sequence[float]]  # candidate -> relative error by head


def table_text(
    header: Mapping[str, Any], sizes: Mapping[str, Any], layers: Sequence[Errors]
) -> str:
    """Return TOML that the option ``table`` of ``sparse-attention`` reads.

    Each head gets the candidate of least error; rows join the heads of a layer that
    have the same. ``[search]`` tells how the table was made and is not read by the
    pass; ``sizes`` in it let ``--sizes`` repeat the search without timing anything.
    """
    lines = [
        "# A pattern for every head, of equal measured cost: the one whose output is",
        "# nearest to dense attention's. After each row: relative L2 error by head.",
        "[search]",
        *(f"{key} = {_value(value)}" for key, value in header.items()),
        "",
    ]
    for name, found in sizes.items():
        lines.append(f"[search.sizes.{name}]")
        lines += [f"{key} = {_value(value)}" for key, value in found.items()]
        lines.append("")
    for index, errors in enumerate(layers):
        lines += _layer_rows(index, errors, sizes)
    return "\n".join(lines).rstrip() + "\n"


def best_of(errors: Errors) -> list[tuple[str, float]]:
    """Return (candidate, error) of each head; equal errors go to the first in order."""
    heads = len(next(iter(errors.values())))
    best = [min(errors, key=lambda name: errors[name][head]) for head in range(heads)]
    return [(name, errors[name][head]) for head, name in enumerate(best)]


def _layer_rows(index: int, errors: Errors, sizes: Mapping[str, Any]) -> list[str]:
    best, lines = best_of(errors), []
    for name in errors:
        heads = [head for head, (found, _) in enumerate(best) if found == name]
        if not heads:
            continue
        scores = ", ".join(f"{head}: {best[head][1]:.4f}" for head in heads)
        lines += ["[[heads]]", f"layers = [{index}]", f"heads = {heads}"]
        options = sizes[name]["options"]
        lines += [f"{key} = {_value(value)}" for key, value in options.items()]
        lines += [f"# {name}, error by head: {scores}", ""]
    return lines


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        inner = ", ".join(f"{key} = {_value(v)}" for key, v in value.items())
        return f"{{ {inner} }}"
    return json.dumps(value)  # strings, numbers and lists are the same in TOML


def read_sizes(path: str) -> tuple[str, dict[str, Any]]:
    """Return (budget, sizes) of a table that a search wrote; ConfigError otherwise."""
    try:
        data = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        search = data["search"]
        return str(search["budget"]), dict(search["sizes"])
    except (OSError, UnicodeDecodeError, tomllib.TOMLDecodeError) as error:
        raise ConfigError(f"--sizes {path}: cannot be read: {error}") from None
    except (KeyError, TypeError):
        raise ConfigError(
            f"--sizes {path}: no [search] table with a budget and sizes; give a file "
            "that graphopt search wrote"
        ) from None
