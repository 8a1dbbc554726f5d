"""What does a decoding step of an ensemble cost beside its members?

Random Llamas, the large one about four times a small one, a prompt in every cache, one
token a step. ``ensemble``: `graphopt.ensemble` compiled by graphopt, the token chosen
in its graph. Against it the large model alone (``large``), the three models compiled
one by one with their logits combined outside (``sequential``), and the uncompiled loop
of proxy-tuning (``eager``: three forwards, the sum, a temperature, a sort for top-p,
softmax, a draw). ``adapter``: the tuned model is a low-rank adapter over the reference,
whose weights a step then reads once.

``step_vs_ideal`` is the ensemble's step over what it would take to read the weights and
keys of all members at the rate at which the large model reads its own.

Then the fused operator against separate ones by vocabulary and batch, and the linears
of two small models stacked into one batched product against two products: why
`logit-arithmetic` leaves forwards with weights of their own apart.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

import graphopt
from benchmarks.harness import compare, keep
from graphopt.ensembles import with_low_rank
from graphopt.ops import combine_sample, skinny_linear

SIZES = {"large": (768, 12), "small": (320, 12)}  # hidden size, layers
QUICK = {"large": (256, 3), "small": (128, 3)}
STEPS = 8  # of a timed run
Sides = dict[str, Callable[[], object]]


def main(quick: bool = False) -> dict[str, Any]:
    """Measure steps, then the operator; the summary has the asked ratios."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    prompt = 32 if quick else 256
    steps = [_steps(kind, prompt, device, quick) for kind in ("tuned", "adapter")]
    vocabularies = (32_000,) if quick else (32_000, 128_256)
    kernels = [
        _kernel(size, batch, top_p, device, 2 if quick else 20)
        for size in vocabularies
        for batch in (1, 16)
        for top_p in (None, 0.9)
    ]
    twins = [_stacked(k, n, device, quick) for k, n in ((320, 864), (864, 320))]
    rows = [*steps, *kernels, *twins]
    for row in rows:
        print(json.dumps(row), file=sys.stderr, flush=True)
    return keep("eft", rows, _summary(steps, kernels, twins), quick=quick)


def _llama(hidden: int, layers: int, vocabulary: int) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        hidden_size=hidden,
        intermediate_size=hidden * 27 // 10 // 32 * 32,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64,
        num_key_value_heads=hidden // 64,
        vocab_size=vocabulary,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).eval()


def _members(kind: str, device: str, quick: bool) -> list[Any]:
    sizes, vocabulary = (QUICK, 4096) if quick else (SIZES, 32_000)
    large = _llama(*sizes["large"], vocabulary)
    small = _llama(*sizes["small"], vocabulary)
    if kind == "tuned":
        tuned = _llama(*sizes["small"], vocabulary)
    else:
        pairs = {}
        for name, module in small.named_modules():
            if name.endswith(("q_proj", "v_proj")):
                out, width = module.weight.shape
                pairs[name] = (torch.randn(8, width), torch.randn(out, 8) / 64, 1.0)
        tuned = with_low_rank(small, pairs)
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    return [m.to(device, dtype) for m in (large, tuned, small)]


@torch.no_grad()
def _steps(kind: str, prompt: int, device: str, quick: bool) -> dict[str, Any]:
    torch._dynamo.reset()
    members = _members(kind, device, quick)
    ids = torch.randint(0, 4096, (1, prompt), device=device)
    token = ids[:, -1:]
    made = graphopt.ensemble(*members)
    sides: Sides = {
        "large": _alone(members[:1], ids, token, compiled=True),
        "ensemble": _ensemble(made, ids, token),
        "sequential": _alone(members, ids, token, compiled=True),
        "eager": _alone(members, ids, token, compiled=False),
    }
    found = compare(sides, runs=1 if quick else 5, warm=2)
    seconds = {name: side.best / STEPS for name, side in found.items()}
    read = [_bytes([m], prompt) for m in members[:1]]
    ideal = seconds["large"] * _bytes(members, prompt) / read[0]
    step = seconds["ensemble"]
    return {
        "case": f"step, {kind}",
        "parameters": [sum(p.numel() for p in m.parameters()) for m in members],
        **{f"{name}_ms": round(1e3 * s, 3) for name, s in seconds.items()},
        "ideal_ms": round(1e3 * ideal, 3),
        "step_vs_ideal": round(step / ideal, 3),
        "step_vs_large": round(step / seconds["large"], 3),
        "step_vs_sequential": round(step / seconds["sequential"], 3),
        "step_vs_eager": round(step / seconds["eager"], 3),
        "utilisation": round(found["ensemble"].utilisation, 3),
    }


def _bytes(members: list[Any], tokens: int) -> int:
    """Return what a step reads: each weight once, keys and values, a row of embeddings.

    The head is tied to the embedding: its weight counts as the head's.
    """
    weights = {p.data_ptr(): p.nbytes for m in members for p in m.parameters()}
    caches = 0
    for member in members:
        c, size = member.config, next(member.parameters()).element_size()
        head = c.hidden_size // c.num_attention_heads
        width = 2 * c.num_key_value_heads * head * size
        caches += tokens * c.num_hidden_layers * width
    return sum(weights.values()) + caches


def _ensemble(made: Any, ids: Tensor, token: Tensor) -> Callable[[], object]:
    graphopt.compile(made)
    cache = made.new_cache()
    made(ids, past_key_values=cache, sampling=(None, None, None))

    def run() -> None:
        with torch.no_grad():
            for _ in range(STEPS):
                made(token, past_key_values=cache, sampling=(None, None, None))
            cache.crop(-STEPS)

    return run


def _alone(
    members: list[Any], ids: Tensor, token: Tensor, compiled: bool
) -> Callable[[], object]:
    """Return steps of models that know nothing of one another."""
    from transformers import DynamicCache

    models = [_compiled(m) if compiled else m for m in members]
    caches = [DynamicCache() for _ in models]
    for model, cache in zip(models, caches, strict=True):
        model(ids, past_key_values=cache, logits_to_keep=1)

    def run() -> None:
        with torch.no_grad():
            for _ in range(STEPS):
                logits = [
                    model(token, past_key_values=cache, logits_to_keep=1).logits[:, -1]
                    for model, cache in zip(models, caches, strict=True)
                ]
                _choose(logits, sampled=not compiled)
            for cache in caches:
                cache.crop(-STEPS)

    return run


def _compiled(model: Any) -> Any:
    return torch.compile(model, backend="graphopt", dynamic=True)


def _choose(logits: list[Tensor], sampled: bool) -> Tensor:
    scores = logits[0].float()
    if len(logits) == 3:
        scores = scores + (logits[1].float() - logits[2].float())
    return separate(scores, 0.8, 0.9) if sampled else scores.argmax(-1)


def separate(scores: Tensor, temperature: float, top_p: float | None) -> Tensor:
    """Draw as transformers does: a temperature, a sort for top-p, multinomial."""
    scores = scores / temperature
    if top_p is not None:
        ascending, order = scores.sort(-1)
        outside = ascending.softmax(-1).cumsum(-1) <= 1 - top_p
        outside[..., -1:] = False
        scores = scores.masked_fill(outside.scatter(1, order, outside), -torch.inf)
    return torch.multinomial(scores.softmax(-1), 1)[:, 0]


@torch.no_grad()
def _kernel(
    size: int, batch: int, top_p: float | None, device: str, repeats: int
) -> dict[str, Any]:
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    rows = [3 * torch.randn(batch, size, device=device).to(dtype) for _ in range(3)]
    one = torch.ones((), device=device)
    given = (rows[0], [rows[1]], [rows[2]], one[None], one)
    share = None if top_p is None else one * top_p
    numbers = torch.rand(batch, device=device)

    def fused() -> None:
        for _ in range(repeats):
            combine_sample(*given, numbers, one * 0.8, share)

    def apart() -> None:
        for _ in range(repeats):
            base, tuned, reference = (r.float() for r in rows)
            separate(base + one * (tuned - reference), 0.8, top_p)

    found = compare({"fused": fused, "separate": apart}, runs=3, warm=1)
    best = {name: side.best / repeats for name, side in found.items()}
    return {
        "case": "combine and sample",
        "vocabulary": size,
        "batch": batch,
        "top_p": top_p,
        **{f"{name}_ms": round(1e3 * s, 4) for name, s in best.items()},
        "speedup": round(best["separate"] / best["fused"], 2),
        "fused_gb_s": round(sum(r.nbytes for r in rows) / best["fused"] / 1e9, 2),
    }


@torch.no_grad()
def _stacked(width: int, outputs: int, device: str, quick: bool) -> dict[str, Any]:
    """Two products of one row in one graph, against one over stacked weights."""
    torch._dynamo.reset()
    pairs = 4 if quick else 64
    x = torch.randn(2, 1, width, device=device)
    weights = torch.randn(pairs, 2, outputs, width, device=device)
    apart = [w.unbind() for w in weights]

    def both(a: Tensor, b: Tensor, v: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
        return skinny_linear(a, v), skinny_linear(b, w)

    two = torch.compile(both, dynamic=False)
    batched = torch.compile(lambda a, w: torch.bmm(a, w.mT), dynamic=False)
    sides: Sides = {
        "two": lambda: [two(x[0], x[1], v, w) for v, w in apart],
        "stacked": lambda: [batched(x, w) for w in weights],
    }
    found = compare(sides, runs=5, warm=2)
    best = {name: side.best for name, side in found.items()}
    rates = {k: round(weights.nbytes / s / 1e9, 2) for k, s in best.items()}
    return {
        "case": "linears of twins",
        "shape": f"{outputs}x{width}",
        **{f"{name}_gb_s": rate for name, rate in rates.items()},
        "saved_us": round(1e6 * (best["two"] - best["stacked"]) / pairs, 1),
        "stacked_speedup": round(best["two"] / best["stacked"], 3),
    }


def _summary(
    steps: list[dict[str, Any]],
    kernels: list[dict[str, Any]],
    twins: list[dict[str, Any]],
) -> dict[str, Any]:
    tuned, adapter = steps
    found = {n: tuned[n] for n in ("step_vs_ideal", "step_vs_sequential")}
    found |= {f"adapter_{n}": adapter[n] for n in found}
    for row in kernels:
        size = f"{row['vocabulary'] // 1000}k_batch_{row['batch']}"
        name = "top_p" if row["top_p"] else "plain"
        found[f"combine_{name}_{size}"] = row["speedup"]
    found["stacked_speedup"] = min(r["stacked_speedup"] for r in twins)
    return found


if __name__ == "__main__":
    print(main()["summary"])
