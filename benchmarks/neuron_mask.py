"""What does decoding gain where it reads fewer weights, or smaller ones?

SmolLM2 behind 512 tokens of real text, the next 32 fed one by one, all sides turn by
turn. Dense: Inductor (``dense``); graphopt's fastest in float32, `skinny-linear`, over
a DynamicCache and over graphopt.Cache (``pages``). Against them `neuron-mask`: the
prompt's core neurons (0.4 of the middle layers), counted by size (``core``) and as in
CoreInfer (``core, signed``), TEAL and CATS at half of the weights with calibrated
thresholds (and, TEAL, greedy levels); and int8 weights, alone, with int8 core neurons,
and with int8 keys and values too. Core sides read the prompt themselves; the others get
the dense model's keys. Calibration reads text behind that which is measured.

``mb`` is what a step has to read by the config (`neuron_mask_bytes`), ``ceiling`` the
dense bytes over it: the most that bytes allow. ``of_ceiling`` is the speedup over
`skinny-linear`, which reads all weights at memory's rate, over that ceiling. Fidelity
is of the next 256 tokens, untimed. The second table follows the dense model's greedy
continuation of the long prompt and of prompts of a few words, where neurons chosen by
stability are known to fail.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch

from benchmarks.decoding import Case
from benchmarks.harness import keep
from benchmarks.neuron_mask_prompts import Figures, continuation_rows
from benchmarks.neuron_mask_sides import Bench, Sizes, rounded
from graphopt.calibration.levels import Levels
from graphopt.calibration.observe import calibrate
from graphopt.models import load
from graphopt.search.levels import find_levels
from graphopt.texts import language_reference

SKINNY, SPARSITY = "skinny-linear", 0.5
INT8 = "shadow-outlier{activations=float,head=true,weights=memory}"
QUICK = ("skinny", "core", "teal", "int8", "int8 core")


SHORT = Sizes(
    prompt=128,
    timed=8,
    judged=16,
    continued=8,
    prompts=2,
    excerpts=2,
    excerpt=128,
    step=0.25,
)


def cases(thresholds: str, levels: str) -> tuple[Case, ...]:
    """Return what is measured beside dense Inductor."""

    def mask(options: str, *rest: str) -> str:
        return ",".join((f"neuron-mask{{{options}}}", *rest, SKINNY))

    def core(options: str, *rest: str) -> str:
        # Prompts of a few tokens are masked too: the second table needs them.
        return mask(f"keep=0.4,min_tokens=0{options}", *rest)

    small = f"sparsity={SPARSITY},thresholds='{thresholds}'"
    codes = core(",buffers=int8", INT8)
    in_place = "page-selection{budget=16384}," + codes
    return (
        Case("skinny", SKINNY, paged=False),
        Case("skinny, pages", SKINNY),
        Case("core", core("")),
        Case("core, signed", core(",criterion=signed")),
        Case("teal", mask(f"method=teal,{small},levels='{levels}'"), paged=False),
        Case("cats", mask(f"method=cats,{small}"), paged=False),
        Case("int8", f"{INT8},{SKINNY}", paged=False),
        Case("int8 core", codes),
        Case("int8 core, int8 pages", in_place, "int8"),
    )


def main(quick: bool = False) -> dict[str, Any]:
    """Measure every side; see the module for what is compared."""
    sizes = SHORT if quick else Sizes()
    loaded = load("smollm2")
    model = loaded.model
    ids = loaded.tokenizer(language_reference(), return_tensors="pt").input_ids
    with tempfile.TemporaryDirectory() as folder:
        thresholds, levels = _calibrated(model, ids[:, 8192:], Path(folder), sizes)
        wanted = cases(str(thresholds), str(levels))
        wanted = tuple(c for c in wanted if not quick or c.name in QUICK)
        bench = Bench(model, ids, sizes, wanted, Levels.read(levels))
        rows = bench.rows()
    core = bench.sides["core"]
    prompt = ids[:, : sizes.prompt]
    more = (loaded.tokenizer, prompt, sizes.continued, sizes.prompts)
    rows += continuation_rows(model, core, *more)
    rows = [rounded(row) for row in rows]
    for row in rows:
        print(json.dumps(row), file=sys.stderr, flush=True)
    return keep("neuron-mask", rows, _summary(rows), quick=quick)


def _calibrated(
    model: Any, ids: torch.Tensor, folder: Path, sizes: Sizes
) -> tuple[Path, Path]:
    """Write the thresholds and levels of TEAL and CATS; return their paths."""
    excerpts = ids.split(sizes.excerpt, dim=1)
    step = len(excerpts) // sizes.excerpts
    texts = excerpts[: step * sizes.excerpts : step]
    found = calibrate(model, texts)
    thresholds = found.write(folder / "smollm2.toml")[0]
    judged = texts[0][:, : sizes.excerpt // 2]
    levels = find_levels(model, judged, found, SPARSITY, step=sizes.step)
    torch._dynamo.reset()
    return thresholds, levels.write(folder / "levels.toml")


def _summary(rows: list[Figures]) -> Figures:
    by = {row["side"]: row for row in rows}
    core, teal = by["core"], by["teal"]
    return {
        "neuron_mask_speedup": core["speedup"],
        "neuron_mask_over_skinny": core["over_skinny"],
        "neuron_mask_of_ceiling": core["of_ceiling"],
        "neuron_mask_kl": core["mean_kl"],
        "neuron_mask_perplexity": core["perplexity"],
        "teal_speedup": teal["speedup"],
        "teal_kl": teal["mean_kl"],
        "teal_perplexity": teal["perplexity"],
        "int8_decode_speedup": by["int8"]["speedup"],
        "int8_core_speedup": by["int8 core"]["speedup"],
        "zero_shot_kl": by["zero-shot, mean"]["mean_kl"],
        "dense_perplexity": by["dense"]["perplexity"],
    }


if __name__ == "__main__":
    print(main()["summary"])
