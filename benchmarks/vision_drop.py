"""What do dropped vision tokens cost a vision-language model, and what do they gain?

Accuracy: the trained model of `examples/tiny_vlm` on held-out test canvases, by method
and by how many of its 144 vision tokens live behind layer 1 of 12, the same for
all methods. ``must`` has the pass's defaults; ``must, tuned`` has the share of the key
set and the ratio of its thresholds that were best on validation canvases at that count.
``must, threshold`` sets those thresholds where validation canvases keep the count on
average; its ``kept`` is the average of the test canvases, asked one by one.
``must, preset`` are the thresholds of MustDrop's authors. The graph runs as the passes
rewrote it, without Inductor.

FLOPs are what `graphopt explain` predicts, the encoder of the image included, as a
share of the lossless graph's. Seconds are ratios to dense Inductor (``dynamic=True,
use_cache=True, logits_to_keep=1``), interleaved; the tiny model is too small to gain,
so a random model in LLaVA-1.5's proportions and with its 576 vision tokens is timed
too. A full run takes about 25 minutes on two cores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from benchmarks.harness import keep
from benchmarks.quality import llava
from benchmarks.quality.vision import Asked, bound_for
from benchmarks.quality.vision_sides import (
    DENSE,
    LOSSLESS,
    MUST,
    PRESET,
    SHARES,
    THRESHOLD,
    TUNED,
    config,
    count,
)
from benchmarks.quality.vision_summary import summary
from benchmarks.quality.vision_time import flops_rows, show, time_rows
from examples.tiny_vlm.data import Canvases, canvases
from examples.tiny_vlm.evaluate import inputs
from examples.tiny_vlm.model import load
from examples.tiny_vlm.text import IMAGE_TOKENS
from graphopt.cli.example_inputs import encoder_in_graph
from graphopt.search.runner import GraphRunner

BASELINES = ("fastv", "random", "pool", "uniform")
BY_BOUNDS = "mode=threshold,similarity=1.0,"  # by thresholds alone, nothing merges
PRESETS = ("192", "128", "64")
# Tried on the validation canvases: the share of the key set, and the ratio of the
# individual threshold to the global one. The first are the pass's defaults.
TRIED = ((0.08, 1.0), (0.08, 10.0), (0.16, 1.0), (0.16, 10.0))


@dataclass(frozen=True)
class Sizes:
    """How much is measured: canvases, shares, and the shapes of the timed model."""

    validation: int = 300
    test: int = 500
    batch: int = 50
    tried: tuple[tuple[float, float], ...] = TRIED
    shares: tuple[float, ...] = SHARES
    timed: tuple[float, ...] = SHARES[1:]
    shapes: tuple[int, int, int] = (12, 768, 24)
    timed_canvases: int = 32


QUICK = Sizes(16, 16, 8, TRIED[1:2], SHARES[1:2], SHARES[1:2], (3, 192, 6), 0)


def main(quick: bool = False) -> dict[str, Any]:
    """Measure accuracy, then seconds; see the module for what is measured."""
    sizes = QUICK if quick else Sizes()
    with encoder_in_graph():
        rows = [*_accuracy(sizes), *_seconds(sizes)]
    return keep("vision-drop", rows, summary(rows, sizes.test), quick=quick)


def _accuracy(sizes: Sizes) -> list[dict[str, Any]]:
    model = load()
    tuning = canvases(sizes.validation, split="validation")
    shown = canvases(sizes.test, split="test")
    asked = Asked(model, shown)
    rows = [_row(asked, DENSE, LOSSLESS, shown, sizes.batch)]
    for share in sizes.shares:
        names = {MUST: config(MUST, share)}
        options = tuned(asked, share, tuning, sizes)
        names[TUNED] = config(MUST, share, options)
        names |= {name: config(name, share) for name in BASELINES}
        for name, text in names.items():
            rows.append(_row(asked, name, text, shown, sizes.batch))
        text = config(MUST, share, f"{BY_BOUNDS}{options}")
        rows.append(_row(asked, THRESHOLD, text, shown, 1, share))
    for preset in PRESETS if len(sizes.shares) > 1 else ():
        text = config(MUST, 0.5, f'mode=threshold,preset="{preset}",')
        rows.append(_row(asked, f"{PRESET} {preset}", text, shown, 1))
    given = inputs(shown[:1])
    rows += flops_rows("tiny", asked.runner, given, IMAGE_TOKENS, sizes.shares)
    return rows


def _seconds(sizes: Sizes) -> list[dict[str, Any]]:
    """Time prefills of the tiny model, a batch, and of LLaVA's shapes, one prompt."""
    rows, others = [], ()
    if sizes.timed_canvases:
        given, others = inputs(canvases(sizes.timed_canvases)), ("fastv", "pool")
        rows += time_rows("tiny", load(), given, IMAGE_TOKENS, sizes.shares, others)
    name, model = "llava shapes", llava.llava(*sizes.shapes)
    given, vision = llava.prompt(model), model.config.image_seq_length
    rows += time_rows(name, model, given, vision, sizes.timed, others)
    runner = GraphRunner(model, use_cache=False)
    return [*rows, *flops_rows(name, runner, given, vision, sizes.timed)]


def _row(
    asked: Asked,
    name: str,
    text: str,
    shown: Canvases,
    batch: int,
    target: float | None = None,
) -> dict[str, Any]:
    found = asked.answers(text, shown, batch)
    row: dict[str, Any] = {"model": "tiny", "config": name, "passes": text}
    row |= {"kept": round(found.kept, 2), "accuracy": round(found.accuracy, 4)}
    asked_for = {} if target is None else {"asked": count(IMAGE_TOKENS, target)}
    return show(row | asked_for)


def tuned(asked: Asked, share: float, shown: Canvases, sizes: Sizes) -> str:
    """Return must's options that answer best on ``shown``, the first of equals.

    Their thresholds are those that keep ``share`` of the vision tokens on average.
    """
    best = (-1.0, "")
    for key_share, ratio in sizes.tried:
        if key_share > share:
            continue
        text = _options(key_share, 1.0, ratio)
        found = asked.answers(config(MUST, share, text), shown, sizes.batch)
        assert found.ranks is not None  # every prompt is as long
        bound = bound_for(found.ranks, count(IMAGE_TOKENS, share))
        if found.accuracy > best[0]:
            best = (found.accuracy, _options(key_share, bound, bound * ratio))
    return best[1]


def _options(key_share: float, summed: float, single: float) -> str:
    return (
        f"key_share={key_share},global_threshold={summed:.6g},"
        f"individual_threshold={single:.6g},"
    )


if __name__ == "__main__":
    print(main()["summary"])
