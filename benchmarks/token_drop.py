"""What does dropping tokens of a prompt gain, and what does it lose?

SmolLM2 on questions about one of several documents (`quality/documents.py`). Speed:
compiled prefills against dense Inductor at its best setting (``dynamic=True,
use_cache=True, logits_to_keep=1``); graphopt's sides keep no keys, as `token-drop`
asks for, and ``lossless`` is the same without a drop. Fidelity: every method of
`token-drop` at the same kept counts, on each question's last position, against the
lossless graph; ``right`` is the share of questions whose answer is the best token.
Those sides are the captured graph as the passes rewrote it, run without Inductor.
``scoring_share`` is what scoring, choosing and taking tokens take of such a prefill,
timed operator by operator. A full run takes about 20 minutes on two cores.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from benchmarks.harness import compare, keep
from benchmarks.quality.documents import Question, question
from benchmarks.quality.shares import OpTimes
from graphopt.agreement import agreement
from graphopt.models import load
from graphopt.search.runner import GraphRunner, configured

SCHEDULE = "schedule=[{depth=0.3,keep=0.7},{depth=0.6,keep=0.5},{depth=0.9,keep=0.3}]"
LOSSLESS = "structured-mask"
METHODS = ("lazy", "fastv", "random", "uniform", "pool")
SPARSE = (
    "sparse-attention{pattern=vertical-slash,sink=30,window=512,vertical=500,slash=100}"
)
COMBINED = "lazy, observe=16, smooth=13, vertical-slash"
# The same work saved, about, by one drop behind layers that know what is asked.
LATE, LATER = "lazy, late", "schedule=[{depth=0.6,keep=0.3}]"
# Ranked by the question, not by one token of it, and by words, not by parts of them.
OBSERVED, RANKED = "lazy, observe=16, smooth=13", "observe=16,smooth=13,"
LENGTHS = (4096, 8192)
# Questions by tokens of the prompt; a model of this size answers short ones.
QUESTIONS = {2048: 10, 4096: 6, 8192: 2}
QUICK = ((512,), {512: 2})
SCORING = tuple(
    f"graphopt.{name}"
    for name in ("token_scores", "smooth_scores", "keep_tokens", "take_tokens")
)


def configs() -> dict[str, str]:
    """Return the config of each side by its label."""
    dropped = {m: f"{LOSSLESS},token-drop{{method={m},{SCHEDULE}}}" for m in METHODS}
    return {
        "lossless": LOSSLESS,
        **dropped,
        OBSERVED: f"{LOSSLESS},token-drop{{{RANKED}{SCHEDULE}}}",
        LATE: f"{LOSSLESS},token-drop{{{LATER}}}",
        COMBINED: f"{LOSSLESS},token-drop{{{RANKED}{SCHEDULE}}},{SPARSE}",
    }


def main(quick: bool = False) -> dict[str, Any]:
    """Measure speed, then fidelity; see the module for what is measured."""
    lengths, questions = QUICK if quick else (LENGTHS, QUESTIONS)
    loaded = load("smollm2")
    asked = {
        tokens: [question(loaded.tokenizer, tokens, i) for i in range(count)]
        for tokens, count in questions.items()
    }
    prompts = {n: question(loaded.tokenizer, n, 0).ids for n in lengths}
    rows: list[dict[str, Any]] = []
    rows += _speed(loaded.model, prompts)
    runner = GraphRunner(loaded.model, use_cache=False)
    for name, config in configs().items():
        runner.add(name, configured(config))
    for tokens, own in asked.items():
        rows += _fidelity(runner, tokens, own)
    for config in ("lazy", OBSERVED):
        rows += [_scoring(runner, config, n, prompts[n]) for n in lengths]
    return keep("token-drop", rows, summary(rows, max(lengths)), quick=quick)


def _show(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    for row in rows:
        print(json.dumps(row), file=sys.stderr, flush=True)
    return rows


def _speed(model: Any, prompts: dict[int, torch.Tensor]) -> list[dict[str, Any]]:
    """Time compiled prefills at every length; one compilation a side serves all."""
    torch._dynamo.reset()
    dense = torch.compile(model, dynamic=True)
    sides = {"inductor": partial(_prefill, dense, True)}
    for name in ("lossless", "lazy", OBSERVED, LATE, COMBINED):
        options = {"config": configs()[name]}
        compiled = torch.compile(
            model, backend="graphopt", dynamic=True, options=options
        )
        sides[name] = partial(_prefill, compiled, False)
    rows = []
    for ids in prompts.values():
        rows += _show(_at_length(sides, ids))
    return rows


def _at_length(
    sides: dict[str, Callable[[torch.Tensor], Any]], ids: torch.Tensor
) -> list[dict[str, Any]]:
    found = compare({n: partial(s, ids) for n, s in sides.items()}, runs=2)
    dense = found["inductor"].best
    return [
        {
            "tokens": ids.shape[1],
            "config": name,
            "seconds": round(seconds.best, 3),
            "speedup": round(dense / seconds.best, 3),
            "utilisation": round(seconds.utilisation, 3),
        }
        for name, seconds in found.items()
    ]


@torch.no_grad()
def _prefill(model: Any, use_cache: bool, ids: torch.Tensor) -> torch.Tensor:
    return model(ids, use_cache=use_cache, logits_to_keep=1).logits


def _fidelity(
    runner: GraphRunner, tokens: int, questions: list[Question]
) -> list[dict[str, Any]]:
    """Compare every side's next token with the lossless one's, over all questions."""
    answers = [q.answer for q in questions]
    logits = {
        name: torch.cat([runner.prefill(name, q.ids)[0] for q in questions])
        for name in configs()
    }
    dense = logits["lossless"]
    rows = []
    for name, own in logits.items():
        right = [int(a) == b for a, b in zip(own.argmax(-1), answers, strict=True)]
        figures = {k: round(v, 5) for k, v in agreement(dense, own).items()}
        row = {"tokens": tokens, "config": name, "questions": len(questions)}
        rows.append(row | figures | {"right": round(sum(right) / len(right), 3)})
    return _show(rows)


def _scoring(
    runner: GraphRunner, config: str, tokens: int, ids: torch.Tensor
) -> dict[str, Any]:
    """Return the share of a prefill that scoring, choosing and taking tokens take."""
    name = f"{config} (timed)"
    times = OpTimes(configured(configs()[config]), SCORING)
    runner.add(name, times.edit)
    runner.prefill(name, ids)  # rewrites the graph, and warms
    share = times.share(lambda: runner.prefill(name, ids))
    row = {"tokens": tokens, "config": config, "scoring_share": round(share, 5)}
    return _show([row])[0]


def summary(rows: list[dict[str, Any]], longest: int) -> dict[str, Any]:
    """Return what the rows come to: speedups, KL and answers by method, the share."""
    timed = {(r["config"], r["tokens"]): r["speedup"] for r in rows if "speedup" in r}
    found: dict[str, Any] = {}
    for (name, tokens), speedup in timed.items():
        if name == "lazy":
            found[f"prefill_speedup_{tokens}"] = speedup
    found[f"combined_speedup_{longest}"] = timed[COMBINED, longest]
    found[f"observed_speedup_{longest}"] = timed[OBSERVED, longest]
    found[f"late_speedup_{longest}"] = timed[LATE, longest]
    found[f"lossless_speedup_{longest}"] = timed["lossless", longest]
    for key, figure in (
        ("kl", "mean_kl"),
        ("top1", "top1_agreement"),
        ("right", "right"),
    ):
        found[key] = _by_method(rows, figure)
    for name, config in (("scoring_share", "lazy"), ("observed_share", OBSERVED)):
        own = (r for r in rows if r["config"] == config and "scoring_share" in r)
        found[name] = max(r["scoring_share"] for r in own)
    return found


def _by_method(rows: list[dict[str, Any]], figure: str) -> dict[int, dict[str, float]]:
    """Return a figure by tokens and method."""
    found: dict[int, dict[str, float]] = {}
    for row in rows:
        if figure in row:
            found.setdefault(row["tokens"], {})[row["config"]] = row[figure]
    return found


if __name__ == "__main__":
    print(main()["summary"])
