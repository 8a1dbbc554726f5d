"""What does a whole model gain on a long prompt?

SmolLM2 on real text: graphopt's patterns, its empty pipeline and its lossless default
against dense Inductor and eager. Inductor gets its best setting, ``dynamic=True,
use_cache=True, logits_to_keep=1``; the rows ``no-cache`` and ``gemma`` run both sides
with ``use_cache=False``. ``gemma`` is Gemma-3-270M's shapes with random weights.
Agreement is that of the next-token distributions at the last 256 positions; a pattern
is faithful when its mean KL at the longest prompt is at most 0.05.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from benchmarks.harness import compare, keep, plot
from graphopt.agreement import agreement
from graphopt.memory import peak_mb, reset_peak
from graphopt.models import load
from graphopt.texts import language_reference

LENGTHS = (1024, 2048, 4096, 8192)
COMPARED = 256  # positions whose next-token distributions are compared
FAITHFUL = 0.05  # mean KL, nats


@dataclass(frozen=True)
class Case:
    """A row: graphopt against Inductor, both with ``use_cache`` or not.

    ``options`` are those of ``sparse-attention``; empty text is the empty pipeline and
    None the default one.
    """

    name: str
    options: str | None
    use_cache: bool = True
    eager: bool = False

    @property
    def config(self) -> str | None:
        """Return the pass config."""
        return f"sparse-attention{{{self.options}}}" if self.options else self.options


PATTERNS = (
    Case("a-shape", "pattern=a-shape,sink=128,window=1024", eager=True),
    Case("streaming", "pattern=streaming,sink=128,window=1024"),
    Case("tri-shape", "pattern=tri-shape,sink=128,window=1024,last=320"),
    Case(
        "vertical-slash",
        "pattern=vertical-slash,sink=64,window=1024,vertical=1000,slash=60",
    ),
    Case("block-sparse", "pattern=block-sparse,blocks=32"),
    Case("antidiagonal", "pattern=antidiagonal,threshold=0.95"),
)
EMPTY = Case("empty", "")
LOSSLESS = Case("no-cache", None, use_cache=False)
GEMMA = Case("gemma", None, use_cache=False)


def main(quick: bool = False) -> dict[str, Any]:
    """Measure every case; see the module for what is compared."""
    lengths = (256, 1024) if quick else LENGTHS
    rows: list[dict[str, Any]] = []
    model, ids = _smollm2(max(lengths))
    rows += _rows(model, ids, lengths, (*PATTERNS, EMPTY))
    rows += _rows(model, ids, lengths[-1:], (LOSSLESS,))
    rows += _rows(_gemma(), ids, lengths[-1:], (GEMMA,))
    if not quick:
        plot("prefill", partial(_draw, rows=rows))
    return keep("prefill", rows, _summary(rows, max(lengths)), quick=quick)


def _smollm2(tokens: int) -> tuple[Any, torch.Tensor]:
    loaded = load("smollm2")
    ids = loaded.tokenizer(language_reference()[: 8 * tokens], return_tensors="pt")
    return loaded.model, ids.input_ids[:, :tokens]


def _gemma() -> Any:
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    sizes = {
        "hidden_size": 640,
        "intermediate_size": 2048,
        "num_hidden_layers": 18,
        "num_attention_heads": 4,
        "num_key_value_heads": 1,
        "head_dim": 256,
        "sliding_window": 512,
        "vocab_size": 262144,
    }
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    config = Gemma3TextConfig(**sizes, layer_types=kinds * 3)
    torch.manual_seed(0)
    return Gemma3ForCausalLM(config).eval()


def _rows(
    model: Any, ids: torch.Tensor, lengths: tuple[int, ...], cases: tuple[Case, ...]
) -> list[dict[str, Any]]:
    """Compare the cases with one Inductor and one eager side at every length."""
    torch._dynamo.reset()
    models = {"inductor": torch.compile(model, dynamic=True)}
    for case in cases:
        options = {"config": case.config}
        models[case.name] = torch.compile(
            model, backend="graphopt", dynamic=True, options=options
        )
    if any(case.eager for case in cases):
        models["eager"] = model
    rows: list[dict[str, Any]] = []
    for tokens in lengths:
        found = _at_length(models, ids[:, :tokens], cases)
        for row in found:  # a full run takes half an hour: show what is known
            print(json.dumps(row), file=sys.stderr, flush=True)
        rows += found
    return rows


def _at_length(
    models: dict[str, Any], ids: torch.Tensor, cases: tuple[Case, ...]
) -> list[dict[str, Any]]:
    sides: dict[str, Callable[..., Any]] = {
        name: partial(_prefill, model, ids, cases[0].use_cache)
        for name, model in models.items()
    }
    logits: dict[str, torch.Tensor] = {}
    peaks: dict[str, float] = {}
    for name, side in sides.items():  # the first calls compile
        logits[name] = side(keep=COMPARED)
        side()
    timed = {name: partial(_watched, name, side, peaks) for name, side in sides.items()}
    found = compare(timed, runs=2 if ids.shape[1] > 4096 else 3, warm=0)
    return [
        {
            "tokens": ids.shape[1],
            "config": case.name,
            "seconds": round(found[case.name].best, 3),
            "inductor_seconds": round(found["inductor"].best, 3),
            "eager_seconds": round(found["eager"].best, 3) if case.eager else None,
            "speedup": round(found["inductor"].best / found[case.name].best, 3),
            **agreement(logits["inductor"], logits[case.name]),
            "peak_mb": round(peaks[case.name]),
            "inductor_peak_mb": round(peaks["inductor"]),
            "utilisation": round(min(s.utilisation for s in found.values()), 3),
        }
        for case in cases
    ]


def _watched(name: str, side: Callable[[], Any], peaks: dict[str, float]) -> None:
    """Run ``side`` and keep its peak memory, in MB."""
    reset_peak()
    side()
    peaks[name] = peak_mb()


@torch.no_grad()
def _prefill(
    model: Any, ids: torch.Tensor, use_cache: bool, keep: int = 1
) -> torch.Tensor:
    """Return the logits [keep, vocab] of the last ``keep`` positions."""
    output = model(ids, use_cache=use_cache, logits_to_keep=keep)
    return output.logits[0, -keep:]


def _summary(rows: list[dict[str, Any]], longest: int) -> dict[str, Any]:
    by = {(r["config"], r["tokens"]): r["speedup"] for r in rows}
    names = [case.name for case in PATTERNS]
    faithful = [
        (r["speedup"], r["mean_kl"], r["config"])
        for r in rows
        if r["config"] in names and r["tokens"] == longest and r["mean_kl"] <= FAITHFUL
    ]
    speedup, kl, name = max(faithful, default=(None, None, None))
    return {
        f"speedup_{longest}": by["a-shape", longest],
        f"best_sparse_speedup_{longest}": speedup,
        "best_sparse_kl": kl,
        "best_sparse_pattern": name,
        "worst_speedup": min(v for (c, _), v in by.items() if c in names),
        "empty_pipeline_worst": min(v for (c, _), v in by.items() if c == "empty"),
        f"no_cache_speedup_{longest}": by["no-cache", longest],
        f"gemma_speedup_{longest}": by["gemma", longest],
    }


def _draw(axes: Any, rows: list[dict[str, Any]]) -> None:
    for name in [case.name for case in (*PATTERNS, EMPTY)]:
        own = [r for r in rows if r["config"] == name]
        lengths, speedups = [r["tokens"] for r in own], [r["speedup"] for r in own]
        axes.plot(lengths, speedups, marker="o", label=f"graphopt, {name}")
    own = [r for r in rows if r["config"] == "a-shape"]
    eager = [r["inductor_seconds"] / r["eager_seconds"] for r in own]
    axes.plot([r["tokens"] for r in own], eager, "k--", label="eager")
    axes.axhline(1.0, color="grey", linewidth=0.8)
    axes.set(xscale="log", xlabel="prompt tokens", ylabel="speedup over dense Inductor")
    axes.legend()


if __name__ == "__main__":
    print(main()["summary"])
