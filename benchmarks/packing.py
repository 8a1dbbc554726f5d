"""What does a padded batch gain when its prompts lie end to end?

SmolLM2, 16 prompts of real text with lengths log-uniform in 32..2048 tokens, padded on
the left: the prefill with keys and values kept and the logits of the last tokens.
``padded`` is the batch under compiled Inductor, ``sorted`` the same in four batches of
similar lengths, each padded to its own longest, ``flat`` and ``bins`` are
`packed-prefill`. ``ideal`` is how many times the FLOPs of the padded batch are those of
the real tokens; ``fraction_of_ideal`` what of it is reached. Each peak comes from a
process of its own, above what was resident before the run and after a short one.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.harness import alone, compare, keep, watched
from benchmarks.lengths import log_uniform
from graphopt.models import load
from graphopt.texts import language_reference

PROMPTS, LONGEST, SHORTEST, GROUPS = 16, 2048, 32, 4
Batch = dict[str, torch.Tensor]
Run = Callable[[], torch.Tensor]


def main(quick: bool = False) -> dict[str, Any]:
    """Measure every side; see the module for what is compared."""
    prompts, longest = (4, 256) if quick else (PROMPTS, LONGEST)
    lengths = log_uniform(prompts, SHORTEST, longest, seed=0)
    loaded, texts = _loaded(lengths)
    sides = _sides(_compiled(loaded.model), texts)
    logits = {name: side() for name, side in sides.items()}  # the first calls compile
    found = compare(sides, runs=1 if quick else 2, warm=0)
    peaks = {name: alone(_peak, name, lengths) for name in sides}
    ideal = _flops(loaded.model, [longest_of(texts)] * prompts) / _flops(
        loaded.model, lengths
    )
    rows = [
        {
            "side": name,
            "seconds": round(found[name].best, 3),
            "speedup": round(found["padded"].best / found[name].best, 3),
            "fraction_of_ideal": round(
                found["padded"].best / found[name].best / ideal, 3
            ),
            "peak_mb": round(peaks[name], 1),
            "worst_logit": round(_distance(logits["padded"], logits[name]), 6),
            "utilisation": round(found[name].utilisation, 3),
        }
        for name in sides
    ]
    for row in rows:
        print(json.dumps(row), file=sys.stderr, flush=True)
    notes = f"lengths {lengths}; ideal {ideal:.3f}"
    return keep("packing", rows, _summary(rows, ideal), quick=quick, notes=notes)


def _loaded(lengths: list[int]) -> tuple[Any, list[torch.Tensor]]:
    """Return SmolLM2 and a text of each length."""
    loaded, longest = load("smollm2"), max(lengths)
    ids = loaded.tokenizer(language_reference(), return_tensors="pt").input_ids[0]
    return loaded, [ids[i * longest :][:n] for i, n in enumerate(lengths)]


def _peak(name: str, lengths: list[int]) -> float:
    loaded, texts = _loaded(lengths)
    models, peaks = _compiled(loaded.model), dict[str, float]()
    _sides(models, [text[:SHORTEST] for text in texts[: 2 * GROUPS]])[name]()
    watched(name, _sides(models, texts)[name], peaks)
    return peaks[name]


def longest_of(texts: list[torch.Tensor]) -> int:
    """Return the tokens of the longest text."""
    return max(len(text) for text in texts)


def padded(texts: list[torch.Tensor]) -> Batch:
    """Return ids and mask [B, S] of ``texts``, padded on the left."""
    width = longest_of(texts)
    ids = torch.zeros((len(texts), width), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, text in enumerate(texts):
        ids[row, width - len(text) :], mask[row, width - len(text) :] = text, 1
    return {"input_ids": ids, "attention_mask": mask}


def _compiled(model: Any) -> dict[str, Any]:
    return {
        "dense": torch.compile(model, dynamic=True),
        **{
            mode: torch.compile(
                model,
                backend="graphopt",
                dynamic=True,
                options={"config": f"packed-prefill{{mode={mode}}}"},
            )
            for mode in ("flat", "bins")
        },
    }


def _sides(models: dict[str, Any], texts: list[torch.Tensor]) -> dict[str, Run]:
    batch = padded(texts)
    order = sorted(range(len(texts)), key=lambda i: len(texts[i]))
    size = len(texts) // GROUPS
    groups = [order[i : i + size] for i in range(0, len(texts), size)]
    parts = [padded([texts[i] for i in group]) for group in groups]
    back = torch.tensor([i for group in groups for i in group]).argsort()
    return {
        "padded": partial(_prefill, models["dense"], [batch]),
        "sorted": lambda: _prefill(models["dense"], parts)[back],
        "flat": partial(_prefill, models["flat"], [batch]),
        "bins": partial(_prefill, models["bins"], [batch]),
    }


@torch.no_grad()
def _prefill(model: Any, batches: list[Batch]) -> torch.Tensor:
    """Return the logits of every prompt's last token, [prompts, V]."""
    kept = [model(**b, use_cache=True, logits_to_keep=1) for b in batches]
    return torch.cat([output.logits[:, -1] for output in kept])


def _flops(model: Any, lengths: list[int]) -> float:
    """Return the FLOPs of the layers' products and of causal attention."""
    config = model.config
    weights = sum(p.numel() for n, p in model.named_parameters() if ".layers." in n)
    width = config.num_attention_heads * config.head_dim
    pairs = sum(n * (n + 1) / 2 for n in lengths)
    return float(
        2 * weights * sum(lengths) + 4 * config.num_hidden_layers * width * pairs
    )


def _distance(want: torch.Tensor, got: torch.Tensor) -> float:
    return float((want - got).abs().max())


def _summary(rows: list[dict[str, Any]], ideal: float) -> dict[str, Any]:
    by = {row["side"]: row for row in rows}
    flat = by["flat"]
    return {
        "ideal": round(ideal, 3),
        "fraction_of_ideal": flat["fraction_of_ideal"],
        "bins_fraction_of_ideal": by["bins"]["fraction_of_ideal"],
        "speedup": flat["speedup"],
        "over_sorted": round(by["sorted"]["seconds"] / flat["seconds"], 3),
        "memory_ratio": round(flat["peak_mb"] / by["padded"]["peak_mb"], 3),
    }


if __name__ == "__main__":
    print(main()["summary"])
