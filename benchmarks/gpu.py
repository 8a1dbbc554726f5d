"""What do kernels and passes gain on a GPU? Llama-3-8B's shapes in bfloat16.

``attention`` rows: the op with sink 128 and window 1024 against dense causal SDPA of
cuDNN and of FlashAttention, and compiled FlexAttention with the same mask. ``prefill``
rows: a model of Llama-3-8B's layers, fewer of them, random weights, under a-shape;
against Inductor with the attention that torch picks and with cuDNN's. ``decode`` rows:
one step of a layer over pages (`benchmarks.device.decode`). ``int8`` and ``gemv`` rows:
single linears (`benchmarks.gpu_linear`). The ``compile`` row: a cold compile of the
default pipeline in a fresh process with empty caches.
``speedup`` is over the fastest dense side, ``rate`` is visited pairs a second over
those of that side. A side without memory or kernel is None and has a note.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from typing import Any

import torch

from benchmarks.device.attention import attention_row
from benchmarks.device.decode import decode_row
from benchmarks.device.prefill import compile_row, prefill_rows
from benchmarks.device.timing import Row
from benchmarks.gpu_linear import linear_rows, linear_summary
from benchmarks.harness import keep
from graphopt.errors import ConfigError

LENGTHS = (8192, 16384, 32768, 65536, 131072)
ROWS, FEW_ROWS = (512, 4096), (1, 4, 16)  # of single linears
PREFILL_LAYERS, COMPILE_LAYERS = 8, 16


def main(quick: bool = False) -> dict[str, Any]:
    """Measure all of them; ConfigError where there is no device."""
    if not torch.cuda.is_available():
        raise ConfigError(
            "bench gpu needs a CUDA device, and torch sees none: run it on a machine "
            "with a GPU and a CUDA build of torch (graphopt doctor)"
        )
    layers = (2, 2) if quick else (PREFILL_LAYERS, COMPILE_LAYERS)
    notes = [f"prefill: {layers[0]} of 32 layers; compile: {layers[1]}"]
    rows: list[Row] = []
    for row in _all_rows((2048,) if quick else LENGTHS, layers, notes):
        print(json.dumps(row), file=sys.stderr, flush=True)
        rows.append(row)
    print(*notes, sep="\n", file=sys.stderr)
    return keep("gpu", rows, _summary(rows), quick=quick, notes="; ".join(notes))


def _all_rows(
    lengths: tuple[int, ...], layers: tuple[int, int], notes: list[str]
) -> Iterator[Row]:
    yield from linear_rows(ROWS[: len(lengths)], FEW_ROWS[: len(lengths)], notes)
    for tokens in lengths:
        yield attention_row("a-shape", tokens, notes)
    for tokens in lengths[::2]:
        yield attention_row("streaming", tokens, notes)
        yield attention_row("sliding-window", tokens, notes)
        yield decode_row(tokens, notes)
    yield from prefill_rows(layers[0], lengths[::2], notes)
    torch.cuda.empty_cache()
    yield compile_row(layers[1], notes)


def _summary(rows: list[Row]) -> dict[str, Any]:
    """Return figures of the longest prompt, of linears, and of a cold compile."""
    own = [r for r in rows if r["what"] == "attention" and r["pattern"] == "a-shape"]
    longest, prefill = own[-1], [r for r in rows if r["what"] == "prefill"][-1]
    flex, cold = longest["flex_ms"], rows[-1]["speedup"]
    over_flex = flex and longest["graphopt_ms"] and flex / longest["graphopt_ms"]
    return {
        f"attention_speedup_{longest['tokens']}": longest["speedup"],
        f"attention_rate_{longest['tokens']}": longest["rate"],
        f"attention_over_flex_{longest['tokens']}": over_flex and round(over_flex, 3),
        f"prefill_speedup_{prefill['tokens']}": prefill["speedup"],
        "compile_ratio": cold and round(1 / cold, 3),
        **linear_summary(rows),
    }


if __name__ == "__main__":
    print(main()["summary"])
