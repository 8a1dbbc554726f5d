"""Seconds and predicted FLOPs of prefills that drop vision tokens."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.harness import compare
from benchmarks.quality.vision import Flops, predicted, warm
from benchmarks.quality.vision_sides import DENSE, LOSSLESS, MUST, config, count
from graphopt.search.runner import GraphRunner


def show(row: dict[str, Any]) -> dict[str, Any]:
    """Print a row as progress."""
    print(json.dumps(row), file=sys.stderr, flush=True)
    return row


def flops_rows(
    name: str,
    runner: GraphRunner,
    given: dict[str, Tensor],
    vision: int,
    shares: Sequence[float],
) -> list[dict[str, Any]]:
    """Return predicted FLOPs at each share over the lossless graph's, batch 1."""
    dense = predicted(runner, LOSSLESS, given)
    found = {s: predicted(runner, config(MUST, s), given) for s in shares}
    return [show(_share(name, count(vision, s), f, dense)) for s, f in found.items()]


def _share(name: str, kept: int, own: Flops, dense: Flops) -> dict[str, Any]:
    return {
        "model": name,
        "kept": kept,
        "gflop": round(own.whole, 3),
        "gflop_share": round(own.whole / dense.whole, 4),
        "layers_gflop_share": round(own.layers / dense.layers, 4),
    }


def time_rows(
    name: str,
    model: Any,
    given: dict[str, Tensor],
    vision: int,
    shares: Sequence[float],
    others: Sequence[str] = (),
) -> list[dict[str, Any]]:
    """Time must at every share, and others at the least, against dense Inductor."""
    torch._dynamo.reset()
    warm(model, given)
    least = min(shares)
    texts = {(LOSSLESS, vision): LOSSLESS}
    texts |= {(MUST, count(vision, s)): config(MUST, s) for s in shares}
    texts |= {(other, count(vision, least)): config(other, least) for other in others}
    dense = torch.compile(model, dynamic=True)
    sides = {f"{DENSE}@{vision}": partial(_prefill, dense, True, given)}
    for (label, kept), text in texts.items():
        options = {"config": text, "strict": True}
        fast = torch.compile(model, backend="graphopt", dynamic=True, options=options)
        sides[f"{label}@{kept}"] = partial(_prefill, fast, False, given)
    found = compare(sides, runs=3)
    base = found[f"{DENSE}@{vision}"].best
    rows = []
    for side, seconds in found.items():
        label, _, kept = side.rpartition("@")
        row = {"model": name, "config": label, "kept": int(kept)}
        row["seconds"] = round(seconds.best, 4)
        row["ratio"] = round(seconds.best / base, 3)
        rows.append(show(row | {"utilisation": round(seconds.utilisation, 3)}))
    return rows


@torch.no_grad()
def _prefill(model: Any, use_cache: bool, given: dict[str, Tensor]) -> Tensor:
    return model(**given, use_cache=use_cache, logits_to_keep=1).logits
