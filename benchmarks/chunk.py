"""What does a prompt in chunks cost, and what memory does it save?

SmolLM2, one prompt of real text of 8,192 tokens, keys and values kept and the logits of
the last token: whole under compiled Inductor against `chunked-prefill`. Seconds come
from one process, turn by turn; each peak from a process of its own, above what was
resident before the run and after a short one, so that no freed memory hides it.
``activation_ratio`` leaves out the keys and values, which both return. ``compiles`` are
those of graphopt for prompts of five lengths. The side ``256 onednn`` has
`onednn-linear` behind the chunks.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.harness import alone, compare, keep, watched
from graphopt.backend import last_reports
from graphopt.models import load
from graphopt.texts import language_reference

CHUNKS = ("256", "256 onednn", "512", "1024")
WARM = 300  # tokens of the run that compiles
LENGTHS = (300, 777, 1000, 2048, 3001)  # compiled once


def main(quick: bool = False) -> dict[str, Any]:
    """Measure both; see the module for what is compared."""
    tokens = 1024 if quick else 8192
    lengths = tuple(n for n in LENGTHS if n <= tokens)
    names = ("whole", *CHUNKS[: 2 if quick else None])
    model, ids = _loaded(tokens)
    sides = {name: _side(model, name) for name in names}
    reports = len(last_reports())
    for length in lengths:
        sides[names[1]](ids[:, :length])
    compiles = len(last_reports()) - reports
    runs = {name: partial(side, ids) for name, side in sides.items()}
    logits = {name: run() for name, run in runs.items()}
    found = compare(runs, runs=1 if quick else 2, warm=0)
    peaks = {name: alone(_peak, name, tokens) for name in names}
    cache_mb = _cache_mb(model, tokens)
    rows = [
        {
            "side": name,
            "tokens": tokens,
            "seconds": round(found[name].best, 3),
            "peak_mb": round(peaks[name], 1),
            "beyond_cache_mb": round(peaks[name] - cache_mb, 1),
            "worst_logit": round(_distance(logits["whole"], logits[name]), 6),
            "utilisation": round(found[name].utilisation, 3),
        }
        for name in sides
    ]
    for row in rows:
        print(json.dumps(row), file=sys.stderr, flush=True)
    notes = f"keys and values: {cache_mb:.0f} MB; compiled for {lengths}"
    summary = _summary(rows, compiles)
    return keep("chunk", rows, summary, quick=quick, notes=notes)


def _loaded(tokens: int) -> tuple[Any, torch.Tensor]:
    loaded = load("smollm2")
    ids = loaded.tokenizer(language_reference()[: 8 * tokens], return_tensors="pt")
    return loaded.model, ids.input_ids[:, :tokens]


def _side(model: Any, name: str) -> Callable[[torch.Tensor], torch.Tensor]:
    if name == "whole":
        compiled = torch.compile(model, dynamic=True)
    else:
        chunk, *onednn = name.split()
        config = f"chunked-prefill{{chunk={chunk}}}"
        options = {"config": f"{config},onednn-linear" if onednn else config}
        compiled = torch.compile(
            model, backend="graphopt", dynamic=True, options=options
        )
    return partial(_prefill, compiled)


@torch.no_grad()
def _prefill(model: Any, ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(ids, use_cache=True, logits_to_keep=1).logits
    return logits


def _peak(name: str, tokens: int) -> float:
    model, ids = _loaded(tokens)
    side, peaks = _side(model, name), dict[str, float]()
    side(ids[:, :WARM])
    watched("it", partial(side, ids), peaks)
    return peaks["it"]


def _cache_mb(model: Any, tokens: int) -> float:
    config = model.config
    width = config.num_key_value_heads * config.head_dim
    size = model.dtype.itemsize
    return float(2 * config.num_hidden_layers * width * tokens * size / 1e6)


def _distance(want: torch.Tensor, got: torch.Tensor) -> float:
    return float((want - got).abs().max())


def _summary(rows: list[dict[str, Any]], compiles: int) -> dict[str, Any]:
    whole, chunked, onednn = rows[:3]

    def ratio(key: str, side: dict[str, Any] = chunked) -> float:
        return round(side[key] / whole[key], 3)

    return {
        "memory_ratio": ratio("peak_mb"),
        "activation_ratio": ratio("beyond_cache_mb"),
        "time_ratio": ratio("seconds"),
        "time_ratio_onednn": ratio("seconds", onednn),
        "compiles": compiles,
    }


if __name__ == "__main__":
    print(main()["summary"])
