"""Sides that decode behind one prompt, and the rows of what is found of them."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks import neuron_mask_bytes as read
from benchmarks.decoding import Case, Side, fill, past
from benchmarks.harness import compare
from benchmarks.neuron_mask_prompts import Figures, perplexity
from graphopt.agreement import agreement
from graphopt.backend import last_reports
from graphopt.calibration.levels import Levels
from graphopt.remarks import Remark
from graphopt.runtime.cache import Cache


@dataclass(frozen=True)
class Sizes:
    """Tokens of the prompt, timed, judged and continued; and of calibration."""

    prompt: int = 512
    timed: int = 32
    judged: int = 256
    continued: int = 24
    prompts: int = 8
    excerpts: int = 16
    excerpt: int = 512
    step: float = 0.05  # of a layer's weights that levels give up at a time

    @property
    def room(self) -> int:
        """Return what a cache has room for, in whole pages."""
        return -(-(self.prompt + self.judged) // 64) * 64 + 64


class Bench:
    """The sides, their caches filled with one prompt, and what is found of them."""

    def __init__(
        self,
        model: Any,
        ids: torch.Tensor,
        sizes: Sizes,
        wanted: tuple[Case, ...],
        levels: Levels,
    ) -> None:
        from transformers import DynamicCache

        self.model, self.sizes, self.levels = model, sizes, levels
        self.ids = ids[0, : sizes.prompt + sizes.judged + 1]
        self.cases = {case.name: case for case in wanted}
        dense = Side(torch.compile(model, dynamic=True), DynamicCache())
        made = {c.name: Side(c.compiled(model), self._cache(c)) for c in wanted}
        self.sides = {"dense": dense, **made}
        self.remarks: dict[str, list[Remark]] = {}

    def _cache(self, case: Case) -> Any:
        if "keep=" not in case.config:
            return case.cache(self.sizes.room)
        options = {"max_tokens": self.sizes.room, "kv_dtype": case.kv_dtype}
        return Cache.from_config(case.config, self.model, **options)

    @torch.no_grad()
    def _read_prompt(self) -> None:
        prompt = self.ids[None, : self.sizes.prompt]
        keys = past(self.model, prompt)
        for side in self.sides.values():
            if getattr(side.cache, "neurons", None) is None:
                fill([side.cache], keys)
            else:
                side.model(prompt, past_key_values=side.cache, logits_to_keep=1)

    def rows(self) -> list[Figures]:
        """Return a row for each side."""
        self._read_prompt()
        sizes = self.sizes
        fed, wanted = self.ids[sizes.prompt : -1], self.ids[sizes.prompt + 1 :]
        figures: dict[str, Figures] = {}
        dense = torch.empty(0)
        for name, side in self.sides.items():
            before = len(last_reports())
            logits = side.run(fed[None])
            self.remarks[name] = _decode_remarks(before)
            dense = logits if name == "dense" else dense
            figures[name] = agreement(dense, logits)
            figures[name]["perplexity"] = perplexity(logits, wanted)
            print(name, rounded(figures[name]), file=sys.stderr, flush=True)
        timed: dict[str, Callable[[], object]] = {
            name: partial(side.run, fed[None, : sizes.timed])
            for name, side in self.sides.items()
        }
        found = compare(timed, runs=3, warm=1)
        seconds = {name: s.best for name, s in found.items()}
        return [
            {
                "table": "decode",
                "side": name,
                "tokens_per_second": sizes.timed / found[name].best,
                **self._gain(name, seconds),
                **figures[name],
                "utilisation": found[name].utilisation,
            }
            for name in self.sides
        ]

    def _gain(self, name: str, seconds: dict[str, float]) -> Figures:
        size = self._bytes(name)
        ceiling = self._bytes("dense") / size
        over = seconds["skinny"] / seconds[name]
        return {
            "speedup": seconds["dense"] / seconds[name],
            "over_skinny": over,
            "mb": size / 1e6,
            "ceiling": ceiling,
            "of_ceiling": over / ceiling,
        }

    def _bytes(self, name: str) -> float:
        """Return what a step of the timed run reads on average."""
        side, remarks = self.sides[name], self.remarks[name]
        case = self.cases.get(name)
        codes = case is not None and "shadow-outlier" in case.config
        linears = read.linear_bytes(self.model, codes)
        if getattr(side.cache, "neurons", None) is not None:
            linears = read.without_core(linears, self.model, side.cache)
        elif name == "teal":
            linears = read.without_small(linears, self.levels, remarks)
        elif name == "cats":
            linears = read.without_closed(linears, self.levels.sparsity, remarks)
        coded = case is not None and case.kv_dtype == "int8"
        tokens = self.sizes.prompt + (self.sizes.timed + 1) / 2
        kept = read.kv_bytes(self.model.config, tokens, coded)
        return sum(linears.values()) + read.other_bytes(self.model) + kept


def _decode_remarks(before: int) -> list[Remark]:
    """Return the remarks of the decoding graph compiled last since ``before``."""
    reports = [r for r in last_reports()[before:] if r.kind == "decode"]
    return reports[-1].all_remarks() if reports else []


def rounded(row: Figures) -> Figures:
    return {k: float(f"{v:.4g}") if isinstance(v, float) else v for k, v in row.items()}
