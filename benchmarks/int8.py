"""What does a whole model gain in int8, and what does it cost in fidelity and memory?

SmolLM2 on real text, prefill with keys and values kept: `shadow-outlier` against dense
compiled Inductor, with all shadows, and with sparse attention; at the shortest length
also with half and 85 % (the default) of the shadows pruned, with none, with a scale a
token, and with int8 weights alone. Ranges are calibrated on
text behind that which is measured. Agreement is that of the next-token distributions at
the last 256 positions. Memory is what is resident after a warm run of each side in a
process of its own.
"""

from __future__ import annotations

import gc
import json
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks.harness import alone, compare, keep
from graphopt.agreement import agreement
from graphopt.calibration.observe import calibrate
from graphopt.models import load
from graphopt.texts import language_reference

LENGTHS = (1024, 4096, 8192)
COMPARED = 256  # positions whose next-token distributions are compared
SPARSE = "sparse-attention{pattern=tri-shape,sink=128,window=1024,last=320}"
_SAMPLES, _SAMPLE = 16, 512  # calibration: excerpts, and tokens of each
MAIN, COMBINED = "shadow-outlier", "shadow-outlier, tri-shape"


def configs(scales: str) -> dict[str, str]:
    """Return the pass configs that are measured, by name."""

    def int8(options: str) -> str:
        return f"shadow-outlier{{{options}}}"

    static = f"scales='{scales}'"
    main_config = int8(f"{static},prune=0.0")
    return {
        MAIN: main_config,
        "half pruned": int8(f"{static},prune=0.5"),
        "85 % pruned": int8(static),
        "no shadow": int8(f"{static},prune=1.0"),
        "scale a token": int8("activations=dynamic"),
        "weights alone": int8("activations=float"),
        COMBINED: f"{SPARSE},{main_config}",
    }


def main(quick: bool = False) -> dict[str, Any]:
    """Measure every side; see the module for what is compared."""
    lengths = (256,) if quick else LENGTHS
    model, ids, texts = load_texts(max(lengths))
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder) / "smollm2.toml")
        calibrate(model, texts[: 2 if quick else None]).write(path)
        rows = _rows(model, ids, lengths, configs(path))
        resident = {
            name: alone(_resident, name, config)
            for name, config in (("inductor", None), (MAIN, configs(path)[MAIN]))
        }
    notes = f"resident MB: {resident}; calibrated on {_SAMPLES} x {_SAMPLE} tokens"
    summary = _summary(rows, lengths, resident)
    return keep("int8", rows, summary, quick=quick, notes=notes)


def load_texts(tokens: int) -> tuple[Any, torch.Tensor, list[torch.Tensor]]:
    """Return the model, the measured ids and excerpts from behind them."""
    loaded = load("smollm2")
    ids = loaded.tokenizer(language_reference(), return_tensors="pt").input_ids
    rest = ids[:, LENGTHS[-1] :].split(_SAMPLE, dim=1)
    step = len(rest) // _SAMPLES
    return loaded.model, ids[:, :tokens], list(rest[: step * _SAMPLES : step])


def _rows(
    model: Any, ids: torch.Tensor, lengths: tuple[int, ...], wanted: dict[str, str]
) -> list[dict[str, Any]]:
    torch._dynamo.reset()
    models = {"inductor": torch.compile(model, dynamic=True)}
    for name, config in wanted.items():
        # The float weights stay: the other sides read them.
        kept = config.replace("shadow-outlier{", "shadow-outlier{weights=memory,")
        models[name] = torch.compile(
            model, backend="graphopt", dynamic=True, options={"config": kept}
        )
    rows: list[dict[str, Any]] = []
    for tokens in lengths:
        found = _at_length(models, ids[:, :tokens])
        for row in found:
            print(json.dumps(row), file=sys.stderr, flush=True)
        rows += found
        # What is pruned or coded otherwise is compared at the first length alone.
        models = {name: models[name] for name in ("inductor", MAIN, COMBINED)}
    return rows


def _at_length(models: dict[str, Any], ids: torch.Tensor) -> list[dict[str, Any]]:
    sides: dict[str, Callable[..., Any]] = {
        name: partial(_prefill, model, ids) for name, model in models.items()
    }
    logits = {name: side(keep=COMPARED) for name, side in sides.items()}
    for side in sides.values():
        side()
    found = compare(sides, runs=2 if ids.shape[1] > 4096 else 3, warm=0)
    dense = found["inductor"].best
    return [
        {
            "tokens": ids.shape[1],
            "side": name,
            "seconds": round(found[name].best, 3),
            "inductor_seconds": round(dense, 3),
            "speedup": round(dense / found[name].best, 3),
            **agreement(logits["inductor"], logits[name]),
            "utilisation": round(min(s.utilisation for s in found.values()), 3),
        }
        for name in models
        if name != "inductor"
    ]


@torch.no_grad()
def _prefill(model: Any, ids: torch.Tensor, keep: int = 1) -> torch.Tensor:
    """Return the logits [keep, vocab] of the last ``keep`` positions."""
    output = model(ids, use_cache=True, logits_to_keep=keep)
    logits: torch.Tensor = output.logits[0, -keep:]
    return logits


def _resident(name: str, config: str | None) -> float:
    """Return what is resident after two runs of 256 tokens, in MB."""
    model, ids, _ = load_texts(256)
    if config is None:
        side = torch.compile(model, dynamic=True)
    else:
        options = {"config": config}
        side = torch.compile(model, backend="graphopt", dynamic=True, options=options)
    for _ in range(2):
        _prefill(side, ids)
    gc.collect()
    return round(psutil.Process().memory_info().rss / 1e6, 1)


def _summary(
    rows: list[dict[str, Any]], lengths: tuple[int, ...], resident: dict[str, float]
) -> dict[str, Any]:
    by = {(row["side"], row["tokens"]): row for row in rows}
    longest = max(lengths)
    summary = {
        f"int8_speedup_{tokens}": by[MAIN, tokens]["speedup"] for tokens in lengths
    }
    return {
        **summary,
        "int8_kl": max(by[MAIN, tokens]["mean_kl"] for tokens in lengths),
        f"combined_speedup_{longest}": by[COMBINED, longest]["speedup"],
        "combined_kl": by[COMBINED, longest]["mean_kl"],
        "resident_mb": resident,
    }


if __name__ == "__main__":
    print(main()["summary"])
