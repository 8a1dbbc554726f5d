"""Core neurons of prompts of a few words, along the dense model's own continuation.

What a prompt of a few tokens activates says little about what follows, so that neurons
chosen from it are known to fail (CoreInfer, section 5; `neuron-mask` leaves prompts
under 200 tokens dense unless it is told otherwise).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.decoding import Side
from graphopt.agreement import agreement

PROMPTS = (
    "Question: What is the capital of France?\nAnswer:",
    "Translate to French: The cat sleeps on the chair.\nFrench:",
    "The three primary colours are",
    "Write a short poem about the sea.\n\n",
    "def fibonacci(n):\n",
    "Question: If a train travels 60 miles in an hour, how far does it go in three "
    "hours?\nAnswer:",
    "Once upon a time, in a village by the river, there lived",
    "Photosynthesis is the process by which",
)
Figures = dict[str, Any]


def continuation_rows(
    model: Any, side: Side, tokenizer: Any, prompt: torch.Tensor, tokens: int, most: int
) -> list[Figures]:
    """Return a row for ``prompt`` [1, S], whose core ``side`` has, one for each of
    ``most`` short prompts, and the mean of these.

    Each is followed along ``tokens`` tokens that ``model`` continues it with.
    """
    rows = [_row(model, side, prompt, tokens, f"long prompt, {prompt.shape[1]} tokens")]
    for text in PROMPTS[:most]:
        ids = tokenizer(text, return_tensors="pt").input_ids
        side.cache.reset()
        with torch.no_grad():
            side.model(ids, past_key_values=side.cache, logits_to_keep=1)
        rows.append(_row(model, side, ids, tokens, text.strip()[:32]))
    return [*rows, _mean(rows[1:])]


@torch.no_grad()
def _row(
    model: Any, side: Side, prompt: torch.Tensor, tokens: int, name: str
) -> Figures:
    whole = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        min_new_tokens=tokens + 1,
        max_new_tokens=tokens + 1,
    )
    fed, wanted = whole[:, prompt.shape[1] : -1], whole[0, prompt.shape[1] + 1 :]
    dense = model(whole[:, :-1], logits_to_keep=tokens).logits[0].float()
    masked = side.run(fed)
    return {
        "table": "continuation",
        "side": name,
        "prompt_tokens": prompt.shape[1],
        **agreement(dense, masked),
        "perplexity": perplexity(masked, wanted),
        "dense_perplexity": perplexity(dense, wanted),
    }


def perplexity(logits: torch.Tensor, following: torch.Tensor) -> float:
    """Return the perplexity of tokens [S] by the logits [S, vocab] before them."""
    return float(torch.nn.functional.cross_entropy(logits, following).exp())


def _mean(rows: Sequence[Figures]) -> Figures:
    """Return the mean of ``rows``; that of perplexities is geometric."""
    found: Figures = {"table": "continuation", "side": "zero-shot, mean"}
    for key in ("prompt_tokens", "top1_agreement", "mean_kl"):
        found[key] = sum(row[key] for row in rows) / len(rows)
    for key in ("perplexity", "dense_perplexity"):
        found[key] = float(torch.tensor([row[key] for row in rows]).log().mean().exp())
    return found
