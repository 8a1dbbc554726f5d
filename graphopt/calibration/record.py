"""Calibrations as files: TOML for people, safetensors beside it for the arrays."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from graphopt.calibration.names import find_name
from graphopt.calibration.statistics import InputStatistics, Magnitudes
from graphopt.errors import ConfigError

_TEXT, _ARRAYS = ".toml", ".safetensors"


@dataclass
class Calibration:
    """What was seen of a model's activations.

    ``inputs``: of each linear, by its weight's name (``layers.0.mlp.up_proj.weight``);
    ``gates``: magnitudes of act(gate) of each gated FFN, by the name of its down
    projection's weight; ``trim``: the share of values beyond the clipped range;
    ``about``: where it comes from (model, text, tokens, seed).
    """

    inputs: dict[str, InputStatistics] = field(default_factory=dict)
    gates: dict[str, Magnitudes] = field(default_factory=dict)
    trim: float = 0.003
    about: dict[str, Any] = field(default_factory=dict)
    path: str = "calibration"

    def input_of(self, name: str) -> InputStatistics | None:
        """Return the statistics of a linear by its weight's name; None for none."""
        found = find_name(name, self.inputs)
        return self.inputs[found] if found else None

    def threshold(self, kind: str, name: str, sparsity: float) -> float:
        """Return the magnitude that the share ``sparsity`` of values do not exceed.

        ``kind``: ``input`` of the linear with the weight ``name``, or ``gate`` of the
        FFN whose down projection has it. Raises ConfigError for an unknown name.
        """
        table: Mapping[str, Any] = self.inputs if kind == "input" else self.gates
        found = find_name(name, table)
        if found is None:
            raise ConfigError(
                f"{self.path}: holds no {kind} of {name}; was it made of this model? "
                "Make it anew with graphopt calibrate"
            )
        held = table[found]
        return (held.magnitudes if kind == "input" else held).quantile(sparsity)

    def write(self, path: str | Path) -> tuple[Path, Path]:
        """Write NAME.toml and NAME.safetensors; return their paths."""
        text, arrays = _paths(path)
        save_file(self._arrays(), arrays)
        text.write_text(self._toml(arrays.name), encoding="utf-8")
        return text, arrays

    def _arrays(self) -> dict[str, Tensor]:
        found: dict[str, Tensor] = {}
        for name, held in self.inputs.items():
            found[f"input.{name}.histogram"] = held.magnitudes.counts.clone()
            found[f"input.{name}.maximum"] = held.channel_maximum.clone()
            found[f"input.{name}.outliers"] = held.outliers.clone()
        for name, gate in self.gates.items():
            found[f"gate.{name}.histogram"] = gate.counts.clone()
        return found

    def _toml(self, arrays: str) -> str:
        lines = [
            "# Ranges of every linear's input on real text, by the weight's name.",
            "# clipped: the magnitude that the share `trim` of its values lie beyond;",
            "# maximum: the largest; importance: maximum / clipped.",
            f"arrays = {json.dumps(arrays)}",
            f"trim = {self.trim}",
            "",
            "[about]",
            *(f"{key} = {json.dumps(value)}" for key, value in self.about.items()),
        ]
        for name, held in self.inputs.items():
            lines += ["", "[[linear]]", f"name = {json.dumps(name)}"]
            lines += [
                f"tokens = {held.tokens}",
                f"clipped = {held.clipped(self.trim):.6g}",
            ]
            lines += [f"maximum = {held.maximum:.6g}"]
            lines += [f"importance = {held.importance(self.trim):.4g}"]
        return "\n".join(lines) + "\n"

    @staticmethod
    def read(path: str | Path) -> Calibration:
        """Read what `write` wrote, by the path of either file.

        Raises ConfigError for a file that is missing or is no calibration.
        """
        text, arrays = _paths(path)
        try:
            facts = tomllib.loads(text.read_text(encoding="utf-8"))
            tensors = load_file(arrays)
            return _joined(facts, tensors, str(text))
        except (OSError, tomllib.TOMLDecodeError, SafetensorError, KeyError) as error:
            raise ConfigError(
                f"{text}: no calibration that can be read ({error}); write one by "
                "graphopt calibrate MODEL --text FILE"
            ) from None


def _paths(path: str | Path) -> tuple[Path, Path]:
    stem = Path(path)
    if stem.suffix in (_TEXT, _ARRAYS):
        stem = stem.with_suffix("")
    return stem.with_name(stem.name + _TEXT), stem.with_name(stem.name + _ARRAYS)


def _joined(
    facts: dict[str, Any], tensors: dict[str, torch.Tensor], path: str
) -> Calibration:
    result = Calibration(trim=facts["trim"], about=facts["about"], path=path)
    for row in facts["linear"]:
        name = row["name"]
        key = f"input.{name}"
        result.inputs[name] = InputStatistics(
            tensors[f"{key}.maximum"],
            tensors[f"{key}.outliers"],
            Magnitudes(tensors[f"{key}.histogram"]),
            row["tokens"],
        )
    for key, counts in tensors.items():
        if key.startswith("gate."):
            name = key.removeprefix("gate.").removesuffix(".histogram")
            result.gates[name] = Magnitudes(counts)
    return result
