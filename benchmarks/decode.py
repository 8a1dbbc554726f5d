"""What does a decoding step gain on a long context?

SmolLM2 with 8,192 tokens of real text in its cache, one prompt, tokens of the text fed
one by one. The dense baselines: Inductor with DynamicCache (``dense``), eager with
StaticCache, which is the fastest that transformers gives on a CPU at this length, and
the fastest that graphopt gives while it reads every key of a DynamicCache, by
`skinny-linear` (``dense, skinny``). Against them graphopt.Cache read densely, all its
pages read in place (``exact``, the same keys as dense), page-selection at several
budgets, with the statistics of Quest and LServe (``extremes``), int8 pages, and
page-selection with `skinny-linear`, as a config file has it by default. Agreement is
that of the next-token distributions with dense at every step.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.decoding import Case, Side, cache_bytes, fill, past
from benchmarks.harness import compare, keep, watched
from graphopt.agreement import agreement
from graphopt.models import load
from graphopt.texts import language_reference

STEPS = 16  # tokens of a timed run

SKINNY = "skinny-linear"
CASES = (
    Case("dense, skinny", SKINNY, paged=False),
    Case("cache", ""),
    Case("exact", "page-selection{budget=16384}"),
    Case("2048", "page-selection{budget=2048}"),
    Case("1024", "page-selection{budget=1024}"),
    Case("1024, every token", "page-selection{budget=1024,interval=1}"),
    Case("1024, extremes", "page-selection{budget=1024}", None, "extremes"),
    Case("1024, int8", "page-selection{budget=1024}", "int8"),
    Case("exact, skinny", "page-selection{budget=16384}," + SKINNY),
    Case("1024, skinny", "page-selection{budget=1024}," + SKINNY),
    Case("1024, int8, skinny", "page-selection{budget=1024}," + SKINNY, "int8"),
)
QUICK = ("exact", "1024", "dense, skinny", "1024, skinny")


def main(quick: bool = False) -> dict[str, Any]:
    """Measure every case; see the module for what is compared."""
    context = 512 if quick else 8192
    loaded = load("smollm2")
    model, text = loaded.model, language_reference()[: 8 * context]
    ids = loaded.tokenizer(text, return_tensors="pt").input_ids
    prompt, following = ids[:, : context - STEPS], ids[:, context - STEPS : context]
    cases = tuple(c for c in CASES if not quick or c.name in QUICK)
    made = _sides(prompt.shape[1], cases)
    sides = {name: side(model) for name, side in made.items()}
    fill([side.cache for side in sides.values()], past(model, prompt))
    logits = {name: side.run(following) for name, side in sides.items()}
    peaks: dict[str, float] = {}
    timed = {
        name: partial(watched, name, partial(side.run, following), peaks)
        for name, side in sides.items()
    }
    found = compare(timed, runs=3, warm=1)
    dense = found["dense"].best
    rows = [
        {
            "context": context,
            "config": name,
            "tokens_per_second": round(STEPS / found[name].best, 2),
            "speedup": round(dense / found[name].best, 3),
            **agreement(logits["dense"], logits[name]),
            "cache_mb": round(cache_bytes(side.cache) / 1e6, 1),
            "step_peak_mb": round(peaks[name], 1),
            "utilisation": round(found[name].utilisation, 3),
        }
        for name, side in sides.items()
    ]
    for row in rows:
        print(json.dumps(row), file=sys.stderr, flush=True)
    return keep("decode", rows, _summary(rows), quick=quick)


def _sides(tokens: int, cases: tuple[Case, ...]) -> dict[str, Callable[[Any], Side]]:
    from transformers import DynamicCache, StaticCache

    room = tokens + 4 * STEPS

    def dense(model: Any) -> Side:
        return Side(torch.compile(model, dynamic=True), DynamicCache())

    def static(model: Any) -> Side:
        return Side(model, StaticCache(config=model.config, max_cache_len=room))

    def own(case: Case, model: Any) -> Side:
        return Side(case.compiled(model), case.cache(room))

    named = {case.name: partial(own, case) for case in cases}
    return {"dense": dense, "eager, static": static, **named}


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    by = {row["config"]: row for row in rows}
    chosen, skinny = by["1024"], by["1024, skinny"]

    def over(row: dict[str, Any], base: str) -> float:
        return round(row["tokens_per_second"] / by[base]["tokens_per_second"], 3)

    return {
        "page_selection_speedup": skinny["speedup"],
        "page_selection_kl": skinny["mean_kl"],
        "page_selection_alone": chosen["speedup"],
        "skinny_linear_alone": by["dense, skinny"]["speedup"],
        "page_selection_over_skinny": over(skinny, "dense, skinny"),
        "over_eager_static": over(skinny, "eager, static"),
        "exact_speedup": by["exact"]["speedup"],
    }


if __name__ == "__main__":
    print(main()["summary"])
