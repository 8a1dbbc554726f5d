"""How far from dense attention is each pattern, and what does it buy?

SmolLM2 on real text. For every row of `quality/patterns.toml`: KL, top-1 agreement and
perplexity of the next-token distributions at the last 256 positions, the share of the
causal pairs that the kernels visit (counted from what they got), and the CPU seconds of
a prefill beside the dense one. Retrieval hides a passkey, and a magic number, at ten
depths. Random columns and a sliding window of the same density are what a method has to
beat. All sides are the model's graph as the pass rewrote it, run without Inductor;
dense is the unrewritten graph. Patterns are forced: short prompts do not fall back.

A run that is cut off goes on where it was. The whole takes about an hour on two cores.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from typing import Any

import torch

from benchmarks.harness import keep, machine, plot
from benchmarks.quality.draw import draw_density, draw_speedup
from benchmarks.quality.measure import DENSE, Bench, Side, sides
from benchmarks.quality.summary import summary
from benchmarks.quality.table import PATTERNS, Setting, read_settings
from graphopt.codegen.cache import cache_dir
from graphopt.models import load
from graphopt.search.partial import Partial
from graphopt.search.runner import configured
from graphopt.texts import language_reference

LENGTHS = (4096, 8192)
RETRIEVAL = (1024, 2048, 4096)
KINDS = ("passkey", "magic-number")
LAST = 256  # positions whose next-token distributions are compared


def main(quick: bool = False) -> dict[str, Any]:
    """Measure every row of the table; see the module for what is measured."""
    settings = [s for s in read_settings() if s.quick or not quick]
    lengths, retrieval = ((2048,), ()) if quick else (LENGTHS, RETRIEVAL)
    bench = _smollm2(max(lengths))
    done = None if quick else Partial(_partial_path(), _depends_on())
    rows = _Rows(done)
    _print_estimate(bench, settings, lengths, retrieval)
    for tokens in lengths:
        for setting in settings:
            _fidelity(bench, rows, setting, tokens)
    for tokens in retrieval:
        rows.add(f"{DENSE}@{tokens}", partial(_dense_found, bench, tokens))
        for setting in (s for s in settings if s.retrieval):
            _retrieval(bench, rows, setting, tokens)
    if not quick:
        plot("fidelity", lambda axes: draw_speedup(axes, rows.all, max(lengths)))
        plot("fidelity-density", lambda a: draw_density(a, rows.all, max(lengths)))
    result = keep("fidelity", rows.all, summary(rows.all, lengths, LAST), quick=quick)
    if done is not None:
        done.remove()
    return result


def _smollm2(tokens: int) -> Bench:
    loaded = load("smollm2")
    text = language_reference()[: 8 * tokens]
    ids = loaded.tokenizer(text, return_tensors="pt").input_ids[:, : tokens + 1]
    return Bench(loaded.model, loaded.tokenizer, ids, LAST)


def _print_estimate(
    bench: Bench, settings: list[Setting], lengths: Any, retrieval: Any
) -> None:
    """Say how long a run from the start takes, as if every prefill were dense."""
    bases = [s.baselines for s in settings]
    passes = dict.fromkeys(lengths, 2 * len(bases) + 2 * sum(bases))
    kinds = [s.retrieval for s in settings if s.retrieval]
    found = 1 + len(kinds) + 2 * kinds.count("with-baselines")
    for tokens in retrieval:
        passes[tokens] = passes.get(tokens, 0) + 20 * found
    seconds = bench.predict_seconds(passes)
    text = ", ".join(f"{n} of {tokens} tokens" for tokens, n in passes.items())
    print(f"prefills: {text}; at most about {seconds / 60:.0f} min", file=sys.stderr)


class _Rows:
    """The rows so far; each group is measured once, also over runs that end early."""

    def __init__(self, done: Partial | None) -> None:
        self.all: list[dict[str, Any]] = []
        self._done = done

    def add(self, name: str, measure: Callable[[], list[dict[str, Any]]]) -> None:
        known = self._done.parts.get(name) if self._done else None
        found = measure() if known is None else known
        for row in found:
            print(json.dumps(row), file=sys.stderr, flush=True)
        if self._done and known is None:
            self._done.keep(name, found)
        self.all += found


def _fidelity(bench: Bench, rows: _Rows, setting: Setting, tokens: int) -> None:
    side = _side(setting)

    def measure() -> list[dict[str, Any]]:
        own = bench.fidelity(side, tokens) | bench.seconds(side, tokens)
        found = [_row(setting, side, tokens) | own]
        if setting.baselines:
            for other in sides(setting, own["density"], tokens):
                found.append(
                    _row(setting, other, tokens) | bench.fidelity(other, tokens)
                )
        return found

    rows.add(f"{side.label}@{tokens}", measure)


def _retrieval(bench: Bench, rows: _Rows, setting: Setting, tokens: int) -> None:
    side = _side(setting)

    def measure() -> list[dict[str, Any]]:
        density = bench.density(side, tokens)
        beside = setting.retrieval == "with-baselines"
        others = list(sides(setting, density, tokens)) if beside else []
        return [
            _row(setting, each, tokens)
            | {"density": round(density, 4)}
            | _found(bench, each, tokens)
            for each in [side, *others]
        ]

    rows.add(f"{side.label} retrieval@{tokens}", measure)


def _side(setting: Setting) -> Side:
    return Side(setting.label, configured(setting.config()))


def _dense_found(bench: Bench, tokens: int) -> list[dict[str, Any]]:
    return [_found(bench, Side(DENSE, configured("")), tokens)]


def _row(setting: Setting, side: Side, tokens: int) -> dict[str, Any]:
    default = setting.default
    return {
        "pattern": setting.pattern,
        "config": side.label,
        "default": default,
        "baseline": side.label != setting.label,
        "tokens": tokens,
    }


def _found(bench: Bench, side: Side, tokens: int) -> dict[str, Any]:
    found = {k: bench.retrieval(side, k, tokens) for k in KINDS}
    return {"config": side.label, "tokens": tokens, **found}


def _partial_path() -> Any:
    return cache_dir() / f"fidelity-{torch.get_num_threads()}-threads.partial.json"


def _depends_on() -> dict[str, Any]:
    table = hashlib.sha256(PATTERNS.read_bytes()).hexdigest()[:16]
    versions = {p: version(p) for p in ("torch", "transformers", "graphopt")}
    return {
        "table": table,
        "machine": machine(),
        "lengths": [LENGTHS, RETRIEVAL],
        "last": LAST,
    } | versions


if __name__ == "__main__":
    print(main()["summary"])
