"""How much do chunks gain that run out of order?

Two questions. In the simulator, the case of llm.npu's paper: 18 layers of four
subgraphs, an NPU for int8 linears beside a CPU (`benchmarks.paper_prefill` says what is
assumed). The share of the makespan that the NPU idles, by policy, number of chunks, and
what norms take; ``npu_bubble_even`` is with attention as long in every chunk. The paper
says 37 % in order and 0.7 % out of order. mllm's stagger, by four subgraphs, puts both
chunks on one processor where a layer has four; by one it does not.

On this machine, SmolLM2 with chunks of 256 tokens, and of 64, which two threads share
less well: `schedule` on two worker threads, each with half of torch's threads, against
the same compiled groups one after the other with all threads; ``loop`` is
`chunked-prefill` alone, whose layers are not cut. The policies run by force, so that
what is slower than in order shows. Both use the same cores: only what one task leaves
idle can be gained.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch

from benchmarks.harness import compare, keep, picture
from benchmarks.paper_prefill import CHUNKS, NORM_SHARE, simulated, timeline
from graphopt.backend import last_reports
from graphopt.models import load
from graphopt.runtime.schedule.gantt import save_gantt
from graphopt.runtime.schedule.policies import IN_ORDER
from graphopt.texts import language_reference

# Chunks, and the share of norms in the CPU's time.
SIMULATED = [(n, NORM_SHARE) for n in (2, 3, CHUNKS, 8, 16)]
SIMULATED += [(CHUNKS, 0.05), (CHUNKS, 0.2)]
CHUNK, SHORT, TOKENS = 256, 64, 2048
POLICY, WORKERS = "greedy", 2
MEASURED = (POLICY, "critical-path", "stagger")
SETTLED = 7  # runs: warm, measured twice, tried, measured, tried, as decided


def main(quick: bool = False) -> dict[str, Any]:
    """Simulate, draw and measure; see the module for what is compared."""
    rows = [row for case in SIMULATED for row in simulated(*case)]
    if not quick:
        titles = (IN_ORDER, POLICY)
        save_gantt(
            {name: timeline(name, CHUNKS) for name in titles}, picture("schedule")
        )
    loaded = load("smollm2")
    tokens = 512 if quick else TOKENS
    ids = loaded.tokenizer(language_reference()[: 8 * tokens], return_tensors="pt")
    prompt = ids.input_ids[:, :tokens]
    for chunk, policies in (CHUNK, MEASURED), (SHORT, MEASURED[:1]):
        few = policies[: 1 if quick else None]
        measured = _measured(loaded.model, prompt, chunk, few, 1 if quick else 3)
        rows += measured
        for row in measured:
            print(json.dumps(row), file=sys.stderr, flush=True)
    return keep("schedule", rows, _summary(rows), quick=quick)


def _measured(
    model: Any, prompt: torch.Tensor, chunk: int, policies: Sequence[str], runs: int
) -> list[dict[str, Any]]:
    sides: dict[str, Callable[[], torch.Tensor]] = {}
    figures: dict[str, dict[str, Any]] = {}
    logits: dict[str, torch.Tensor] = {}
    for name in ("loop", IN_ORDER, *policies):
        sides[name] = partial(_prefill, _side(model, name, chunk), prompt)
        for _ in range(SETTLED):
            logits[name] = sides[name]()
        figures[name] = _found()
    times = compare(sides, runs=runs, warm=0)
    base = times[IN_ORDER].best
    return [
        {
            "case": f"smollm2 {chunk}",
            "policy": name,
            "chunks": prompt.shape[1] // chunk,
            "seconds": round(times[name].best, 3),
            "makespan_ratio": round(times[name].best / base, 4),
            "utilisation": round(times[name].utilisation, 3),
            "same_bits": torch.equal(logits[name], logits[IN_ORDER]),
            **figures[name],
        }
        for name in sides
    ]


def _side(model: Any, name: str, chunk: int) -> Any:
    config = f"chunked-prefill{{chunk={chunk}}}"
    if name != "loop":
        order = f"policy={name},processors={WORKERS},force=true"
        config = f"{config},schedule{{{order}}}"
    return torch.compile(
        model, backend="graphopt", dynamic=True, options={"config": config}
    )


@torch.no_grad()
def _prefill(model: Any, ids: torch.Tensor) -> torch.Tensor:
    logits: torch.Tensor = model(ids, use_cache=True, logits_to_keep=1).logits
    return logits


def _found() -> dict[str, Any]:
    """Return what the scheduler of the last graph said: of the layers alone."""
    remarks = [r for r in last_reports()[-1].remarks if r.code == "order"]
    if not remarks:
        return {}
    found = remarks[-1].figures
    measured, in_order = found["measured_seconds"], found["in_order_seconds"]
    return {
        "layers_in_order": round(in_order, 3),
        "layers_predicted": round(found["predicted_seconds"], 3),
        "bubbles": found["bubble_rates"],
        "layers_measured": None if measured is None else round(measured, 3),
        "faster": measured is not None and measured < in_order,
    }


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    paper = [r for r in rows if r["case"] == "paper"]
    by = {(r["policy"], r["chunks"]): r for r in paper if r["norm_share"] == NORM_SHARE}
    greedy = [r for r in paper if r["policy"] == POLICY and r["chunks"] == CHUNKS]
    bubbles = [r[key] for r in greedy for key in ("npu_bubble", "npu_bubble_even")]
    own, short = (
        {r["policy"]: r for r in rows if r["case"] == f"smollm2 {chunk}"}
        for chunk in (CHUNK, SHORT)
    )
    seconds = own[POLICY]["seconds"]
    return {
        "npu_bubble_in_order": by[IN_ORDER, CHUNKS]["npu_bubble"],
        "npu_bubble_greedy": by[POLICY, CHUNKS]["npu_bubble"],
        "npu_bubble_greedy_range": [min(bubbles), max(bubbles)],
        "npu_bubble_critical_path": by["critical-path", CHUNKS]["npu_bubble"],
        "npu_bubble_greedy_16_chunks": by[POLICY, 16]["npu_bubble"],
        "paper_makespan_ratio": by[POLICY, CHUNKS]["makespan_ratio"],
        "two_workers_ratio": own[POLICY]["makespan_ratio"],
        "two_workers_ratio_to_loop": round(seconds / own["loop"]["seconds"], 4),
        "two_workers_ratio_64": short[POLICY]["makespan_ratio"],
    }


if __name__ == "__main__":
    print(main()["summary"])
