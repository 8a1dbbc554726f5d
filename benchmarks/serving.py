"""How well are many requests served at once, and by which schedule?

SmolLM2 on this machine: 32 requests with prompts of real text, log-uniform in 64..2048
tokens, and 64 new tokens each, arriving at random (Poisson) at three rates, in seconds
as they pass. The engine under its four schedulers: time to the first token and between
tokens (p50 and p99 over all tokens of all requests) and new tokens a second from the
first arrival to the last token. Linears are those of `onednn-linear` for all of them.
Beside it transformers' ``generate_batch`` (continuous batching, as it comes), all
requests at once, against the engine given all at once.
"""

from __future__ import annotations

import json
import random
import sys
import time
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch

from benchmarks.harness import keep, wait_for_quiet
from benchmarks.lengths import log_uniform
from graphopt.models import load
from graphopt.runtime.engine import Engine, EngineOptions, Handle, SamplingParams
from graphopt.runtime.engine.compiled import CompiledExecutor
from graphopt.texts import language_reference

SCHEDULERS = ("request-level", "prefill-first", "decode-first", "sarathi")
RATES = (0.7, 1.2, 2.0)  # requests a second
REQUESTS, SHORTEST, LONGEST, NEW = 32, 64, 2048, 64
BUDGET, TILE, PAGES = 256, 64, 1200
AT_ONCE = "at once"
CONFIG = "onednn-linear"


def main(quick: bool = False) -> dict[str, Any]:
    """Serve at every rate; see the module for what is compared."""
    requests, longest, new = (4, 256, 8) if quick else (REQUESTS, LONGEST, NEW)
    rates = RATES[-1:] if quick else RATES
    loaded = load("smollm2")
    prompts = _prompts(loaded.tokenizer, requests, longest)
    executor = CompiledExecutor(
        loaded.model, PAGES, config=CONFIG, rows=requests, max_length=4096
    )
    _serve(executor, "sarathi", prompts[:4], [0.0] * 4, 4)  # builds kernels
    rows: list[dict[str, Any]] = []
    for rate in rates:
        for scheduler in SCHEDULERS:
            rows.append(row_of(executor, scheduler, prompts, rate, new))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
    rows.append(row_of(executor, "sarathi", prompts, None, new))
    rows.append(_transformers_row(loaded.model, prompts, new))
    for row in rows[-2:]:
        print(json.dumps(row), file=sys.stderr, flush=True)
    return keep("serving", rows, _summary(rows, rates[-1]), quick=quick)


def _prompts(tokenizer: Any, requests: int, longest: int) -> list[list[int]]:
    ids = tokenizer(language_reference(), return_tensors="pt").input_ids[0].tolist()
    lengths = log_uniform(requests, SHORTEST, longest, seed=1)
    random.Random(2).shuffle(lengths)  # the longest is not the first
    return [ids[i * longest :][:n] for i, n in enumerate(lengths)]


def arrivals_of(requests: int, rate: float | None) -> list[float]:
    """Return seconds from the start, one a request; all zero for no rate."""
    if rate is None:
        return [0.0] * requests
    draw = random.Random(3)
    gaps = [draw.expovariate(rate) for _ in range(requests - 1)]
    return [0.0, *accumulate(gaps)]


def row_of(
    executor: CompiledExecutor,
    scheduler: str,
    prompts: Sequence[list[int]],
    rate: float | None,
    new: int,
) -> dict[str, Any]:
    wait_for_quiet(20.0)
    arrivals = arrivals_of(len(prompts), rate)
    cpu, start = time.process_time(), time.perf_counter()
    handles, engine = _serve(executor, scheduler, prompts, arrivals, new)
    seconds = time.perf_counter() - start
    busy = time.process_time() - cpu
    worked = sum(step.seconds for step in engine.history)
    stats = [handle.statistics for handle in handles]
    firsts = [s.time_to_first_token or 0.0 for s in stats]
    between = [gap for s in stats for gap in s.times_between_tokens]
    return {
        "scheduler": scheduler,
        "rate": AT_ONCE if rate is None else rate,
        "tokens_per_second": round(len(prompts) * new / seconds, 2),
        "ttft_p50": round(_quantile(firsts, 0.5), 3),
        "ttft_p99": round(_quantile(firsts, 0.99), 3),
        "tbt_p50": round(_quantile(between, 0.5), 4),
        "tbt_p99": round(_quantile(between, 0.99), 4),
        "steps": len(engine.history),
        "utilisation": round(busy / (worked * torch.get_num_threads()), 3),
    }


def _serve(
    executor: CompiledExecutor,
    scheduler: Any,
    prompts: Sequence[list[int]],
    arrivals: Sequence[float],
    new: int,
) -> tuple[list[Handle], Engine]:
    """Submit each prompt at its time and run steps until all have ended."""
    options = EngineOptions(
        budget=BUDGET,
        tile=TILE,
        scheduler=scheduler,
        max_running=executor.rows,
        share_prefixes=False,
    )
    engine = Engine(executor, options=options)
    params = SamplingParams(max_new_tokens=new, ignore_eos=True)
    handles: list[Handle] = []
    start = time.perf_counter()
    while len(handles) < len(prompts) or not engine.idle:
        now = time.perf_counter() - start
        while len(handles) < len(prompts) and arrivals[len(handles)] <= now:
            handles.append(engine.submit(prompts[len(handles)], params))
        if engine.step() is None:
            time.sleep(max(0.0, arrivals[len(handles)] - now))
    return handles, engine


def _transformers_row(
    model: Any, prompts: Sequence[list[int]], new: int
) -> dict[str, Any]:
    """Serve all prompts by transformers' own continuous batching."""
    from transformers import GenerationConfig

    config = GenerationConfig(
        max_new_tokens=new, do_sample=False, eos_token_id=-1, pad_token_id=0
    )
    wait_for_quiet(20.0)
    cpu, start = time.process_time(), time.perf_counter()
    outputs = model.generate_batch(list(prompts), generation_config=config)
    seconds = time.perf_counter() - start
    made = sum(len(output.generated_tokens) for output in outputs.values())
    busy = time.process_time() - cpu
    return {
        "scheduler": "transformers",
        "rate": AT_ONCE,
        "tokens_per_second": round(made / seconds, 2),
        "utilisation": round(busy / (seconds * torch.get_num_threads()), 3),
    }


def _quantile(values: Sequence[float], share: float) -> float:
    return float(torch.tensor(values, dtype=torch.float64).quantile(share))


def _summary(rows: list[dict[str, Any]], rate: float) -> dict[str, Any]:
    by = {(row["scheduler"], row["rate"]): row for row in rows}
    ours, other = by["sarathi", rate], by["prefill-first", rate]
    at_once, theirs = by["sarathi", AT_ONCE], by["transformers", AT_ONCE]
    return {
        "rate": rate,
        "tbt_p99_ratio": round(ours["tbt_p99"] / other["tbt_p99"], 3),
        "throughput_ratio": round(
            ours["tokens_per_second"] / other["tokens_per_second"], 3
        ),
        "throughput_vs_transformers": round(
            at_once["tokens_per_second"] / theirs["tokens_per_second"], 3
        ),
    }


if __name__ == "__main__":
    print(main()["summary"])
