"""How far does a model scale over processes and stages?

Two questions. On this machine, ``prefill``: a random Llama of 150 million parameters
(`benchmarks.scale_worker`) under graphopt's default passes, strong scaling over one and
two processes of one thread each, which share out heads and neurons (TP) and exchange
over gloo. The ratio is that of the best runs; 2 would be perfect.

In the simulator, ``serving``: Llama-3-70B in bfloat16 on 8 to 64 H100s, TP = 8 within
a node and a stage a node (PP), all requests there at once, 1K to 4K tokens (Zipf, theta
0.4, ten prompt tokens to a new one: SARATHI, arXiv 2308.16369, section 5.3).
``sarathi`` cuts prompts into chunks and adds decodes up to the budget, so that
micro-batches are alike; ``decode-first`` (Orca) and ``prefill-first`` (vLLM of 2023)
run whole prompts. ``bubble_share`` is the part of the stages' time that they waited for
a micro-batch while there was work. Rates, latencies and the shares of them that are
reached are assumed, as `benchmarks.scale_cluster` lists them; ``notes`` of the result
repeats them.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.harness import keep, plot, wait_for_quiet
from benchmarks.scale_cluster import (
    TILE,
    Cluster,
    Model,
    Roofline,
    Split,
    assumptions,
    fitted,
)
from graphopt.ops.pages import PAGE
from graphopt.runtime.engine import EngineOptions
from graphopt.runtime.engine.simulator import (
    Simulation,
    poisson_arrivals,
    zipf_lengths,
)

LENGTHS, RUNS, TURNS = (512, 2048), 3, 2
SPLITS = tuple(Split(8, pp) for pp in (1, 2, 4, 8))
SCHEDULERS = ("sarathi", "decode-first", "prefill-first")
CHUNKED, WHOLE = SCHEDULERS[:2]
BUDGET, RUNNING = 512, 64  # tokens and requests of a micro-batch
REQUESTS = 2048
_LIMIT = 900  # seconds a group of processes may take, compiling included


def main(quick: bool = False) -> dict[str, Any]:
    """Measure and simulate; see the module for what is compared."""
    lengths, turns = ((64,), 1) if quick else (LENGTHS, TURNS)
    rows = _measured(lengths, turns, 2.0 if quick else 120.0)
    splits = SPLITS[:2] if quick else SPLITS
    rows += _simulated(splits, 48 if quick else REQUESTS)
    if not quick:
        plot("scale", partial(_draw, rows=rows))
    notes = json.dumps(assumptions(Model(), Cluster()))
    return keep("scale", rows, _summary(rows), quick=quick, notes=notes)


def _measured(
    lengths: tuple[int, ...], turns: int, wait: float
) -> list[dict[str, Any]]:
    """Prefill with one and two processes, turn by turn; keep the best of each."""
    best: dict[tuple[int, int], dict[str, Any]] = {}
    for _ in range(turns):
        for tp in (1, 2):
            wait_for_quiet(wait)
            for found in _launched(tp, lengths):
                key = (tp, found["tokens"])
                if key not in best or found["seconds"] < best[key]["seconds"]:
                    best[key] = found
    rows = []
    for (tp, tokens), found in best.items():
        ratio = best[1, tokens]["seconds"] / found["seconds"]
        rows.append({"case": "prefill", "tp": tp, **found, "ratio": round(ratio, 3)})
        print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def _launched(tp: int, lengths: tuple[int, ...]) -> list[dict[str, Any]]:
    root = Path(__file__).parents[1]
    paths = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    script = str(Path(__file__).parent / "scale_worker.py")
    done = subprocess.run(
        [
            *run,
            f"--nproc-per-node={tp}",
            script,
            str(tp),
            json.dumps(lengths),
            str(RUNS),
        ],
        capture_output=True,
        text=True,
        timeout=_LIMIT,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths},
        check=False,
    )
    lines = [x for x in done.stdout.splitlines() if x.startswith("RESULT ")]
    if done.returncode or not lines:
        raise RuntimeError(
            f"{tp} processes ended with {done.returncode}: {done.stderr}"
        )
    found: list[dict[str, Any]] = json.loads(lines[-1].removeprefix("RESULT "))
    return found


def _simulated(splits: tuple[Split, ...], requests: int) -> list[dict[str, Any]]:
    rows = []
    for split in splits:
        for scheduler in SCHEDULERS:
            rows.append(simulated(split, scheduler, requests))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    return rows


def simulated(split: Split, scheduler: Any, requests: int) -> dict[str, Any]:
    """Return the figures of one schedule; as many requests a GPU for every split."""
    roofline = Roofline(Model(), Cluster(), split)
    found = fitted(roofline)
    lengths = zipf_lengths(1024, 4096, 0.4, 10.0)
    number = max(1, requests * split.gpus // 64)
    arrivals = poisson_arrivals(number, float("inf"), lengths)
    options = EngineOptions(
        budget=BUDGET,
        tile=TILE,
        scheduler=scheduler,
        max_running=RUNNING,
        share_prefixes=False,
    )
    report = Simulation(
        arrivals, options, found.cost, roofline.pages(PAGE), split.pp
    ).run()
    return {
        "case": "serving",
        "gpus": split.gpus,
        "tp": split.tp,
        "pp": split.pp,
        "scheduler": scheduler,
        "requests": number,
        "tokens_per_second": round(report.throughput),
        "per_gpu": round(report.throughput / split.gpus, 1),
        "bubble_share": round(report.bubble_share, 4),
        "request_bubble_s": round(report.bubble(), 4),
        "tbt_p99": round(report.time_between_tokens(0.99), 4),
        "fit_error": round(found.error, 3),
    }


def _summary(rows: list[dict[str, Any]]) -> dict[str, Any]:
    prefill = [row for row in rows if row["case"] == "prefill" and row["tp"] == 2]
    longest = max(prefill, key=lambda row: row["tokens"])
    serving = {
        (row["gpus"], row["scheduler"]): row for row in rows if row["case"] == "serving"
    }
    least, most = (pick(gpus for gpus, _ in serving) for pick in (min, max))
    chunked, whole = serving[most, CHUNKED], serving[most, WHOLE]
    return {
        "prefill_tp2_ratio": longest["ratio"],
        "prefill_tokens": longest["tokens"],
        "gpus": most,
        "throughput_ratio": _ratio(chunked, whole, "tokens_per_second"),
        "bubble_share_chunked": chunked["bubble_share"],
        "bubble_share_whole": whole["bubble_share"],
        "scaling_chunked": _ratio(
            chunked, serving[least, CHUNKED], "tokens_per_second"
        ),
        "scaling_perfect": most / least,
    }


def _ratio(one: dict[str, Any], other: dict[str, Any], key: str) -> float:
    return round(one[key] / other[key], 3)


def _draw(axes: Any, rows: list[dict[str, Any]]) -> None:
    """Draw throughput over GPUs, and the bubbles as numbers at the points."""
    for scheduler, up in zip(SCHEDULERS, (6, 6, -12), strict=True):
        found = [row for row in rows if row.get("scheduler") == scheduler]
        gpus = [row["gpus"] for row in found]
        axes.plot(gpus, [r["tokens_per_second"] for r in found], "o-", label=scheduler)
        for row in found:
            axes.annotate(
                f"{row['bubble_share']:.0%}",
                (row["gpus"], row["tokens_per_second"]),
                textcoords="offset points",
                xytext=(-6, up),
                fontsize=7,
            )
    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=2)
    sizes = sorted({row["gpus"] for row in rows if "gpus" in row})
    axes.set_xticks(sizes, list(map(str, sizes)))
    axes.set_xlabel("H100s (TP = 8, a stage a node)")
    axes.set_ylabel("tokens a second, prompts and new")
    axes.set_title("Llama-3-70B, simulated; numbers: share of bubbles", fontsize=9)
    axes.legend()


if __name__ == "__main__":
    print(main()["summary"])
