"""What do sixteen layers of five stages cost against sixteen of their own?

The auxiliary model of SWS at DeiT-S's widths (384 channels, 6 heads, 196 patches and a
class token, 16 layers by stages of 3, 3, 4, 3, 3), trained a step at a time with AdamW
through graphopt: ``untied`` has a set of parameters a layer, ``tied`` is what
`graphopt.learngene.build` makes of it, ``pass`` the untied module under `weight-tying`.
Steps are timed turn by turn in one process. Compiling is cold, forward and backward,
and the peak is that of two steps with all that a training holds, each in a process of
its own; ``inductor`` compiles the untied model without graphopt.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

import graphopt
from benchmarks.harness import alone, compare, keep, wait_for_quiet
from graphopt import learngene
from graphopt.memory import peak_mb, reset_peak

STAGES, SMALL_STAGES = [3, 3, 4, 3, 3], [2, 1]
SIDES = ("untied", "tied", "pass")
_FULL = {"hidden_size": 384, "intermediate_size": 1536, "num_attention_heads": 6}
_SMALL = {"hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}


def main(quick: bool = False) -> dict[str, Any]:
    """Measure all; see the module for what is compared."""
    found = compare(
        {side: stepper(side, quick) for side in SIDES}, runs=1 if quick else 5, warm=2
    )
    rows = []
    for side in (*SIDES, "inductor"):
        wait_for_quiet(1.0 if quick else 120.0)
        row: dict[str, Any] = {"side": side, "compile_seconds": _cold(side, quick)}
        if side in found:
            row["step_seconds"] = round(found[side].best, 4)
            row["utilisation"] = round(found[side].utilisation, 3)
            row["peak_mb"] = round(alone(_peak, side, quick), 1)
            row["parameters_mb"] = round(_parameters_mb(side, quick), 2)
        rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
    return keep("sws", rows, _summary(rows), quick=quick)


def model(side: str, quick: bool) -> nn.Module:
    """Return the model of a side, in training."""
    sizes = _SMALL if quick else _FULL
    config = ViTConfig(
        **sizes,
        num_hidden_layers=sum(_stages(quick)),
        image_size=32 if quick else 224,
        patch_size=8 if quick else 16,
        num_labels=100,
    )
    torch.manual_seed(0)
    made: nn.Module = ViTForImageClassification(config)
    return (learngene.build(made, _stages(quick)) if side == "tied" else made).train()


def _stages(quick: bool) -> list[int]:
    return SMALL_STAGES if quick else STAGES


def stepper(side: str, quick: bool) -> Callable[[], object]:
    """Return a function that makes one step of a training."""
    made = model(side, quick)
    optimiser = torch.optim.AdamW(made.parameters(), lr=1e-5)
    if side == "inductor":
        made.compile()
    else:
        stages = ",".join(map(str, _stages(quick)))
        config = f"weight-tying{{stages=[{stages}]}}" if side == "pass" else None
        graphopt.compile(made, config, dynamic=False)
    size = 32 if quick else 224
    batch = 2 if quick else 8
    images, labels = torch.rand(batch, 3, size, size), torch.randint(100, (batch,))

    def step() -> object:
        optimiser.zero_grad(set_to_none=True)
        loss = made(pixel_values=images, labels=labels).loss
        loss.backward()
        optimiser.step()
        return loss

    return step


def seconds_to_compile(side: str, quick: bool) -> float:
    """Return how long the first step takes longer than the second."""
    step = stepper(side, quick)
    took = []
    for _ in range(2):
        start = time.perf_counter()
        step()
        took.append(time.perf_counter() - start)
    return took[0] - took[1]


def _cold(side: str, quick: bool) -> float:
    program = (
        "from benchmarks.sws import seconds_to_compile; "
        f"print(seconds_to_compile({side!r}, {quick}))"
    )
    with tempfile.TemporaryDirectory() as folder:
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "TORCHINDUCTOR_CACHE_DIR": folder,
            "TORCHINDUCTOR_FORCE_DISABLE_CACHES": "1",
        }
        command = [sys.executable, "-c", program]
        result = subprocess.run(
            command, env=environment, capture_output=True, text=True, check=True
        )
    return round(float(result.stdout.splitlines()[-1]), 2)


def _peak(side: str, quick: bool) -> float:
    """Return MB at the worst moment of two steps: weights, gradients, moments and all.

    Above a process that has compiled a small model already, so that what the compiler
    itself loads does not count.
    """
    stepper("untied", quick=True)()
    gc.collect()
    reset_peak()
    before = peak_mb()
    step = stepper(side, quick)
    step()  # compiles, which takes more than the steps
    gc.collect()
    reset_peak()
    step()
    step()
    return peak_mb() - before


def _parameters_mb(side: str, quick: bool) -> float:
    parameters = model(side, quick).parameters()
    return sum(p.numel() * p.element_size() for p in parameters) / 1e6


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    by = {row["side"]: row for row in rows}

    def ratio(key: str, one: str, other: str) -> float:
        return round(by[one][key] / by[other][key], 3)

    return {
        "compile_ratio": ratio("compile_seconds", "tied", "untied"),
        "compile_vs_inductor": ratio("compile_seconds", "tied", "inductor"),
        "memory_ratio": ratio("peak_mb", "tied", "untied"),
        "parameters_ratio": ratio("parameters_mb", "tied", "untied"),
        "train_step_ratio": ratio("step_seconds", "tied", "untied"),
        "train_step_ratio_pass": ratio("step_seconds", "pass", "untied"),
    }


if __name__ == "__main__":
    print(main()["summary"])
