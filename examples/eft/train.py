"""Train the example's models from scratch, and keep them in a folder."""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from examples.eft.data import VOCABULARY, batches

LENGTH, ROWS = 256, 8  # tokens of a piece, pieces of a step
RATE = {"small": 3e-3, "large": 1.5e-3, "tuned": 1e-3}


def model(hidden: int, layers: int, seed: int) -> LlamaForCausalLM:
    """Return a random Llama over bytes, with a tied head."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 16 * 16,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 32,
        num_key_value_heads=hidden // 32,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def train(
    net: LlamaForCausalLM, ids: Tensor, steps: int, rate: float, seed: int, name: str
) -> float:
    """Train on random pieces of ``ids``; return the CPU seconds it took."""
    start = time.process_time()
    optimiser = torch.optim.AdamW(net.parameters(), lr=rate, weight_decay=0.1)
    net.train()
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate * _schedule(step, steps)
        piece = batches(ids, ROWS, LENGTH, seed * 1_000_003 + step)
        loss: Any = net(piece, labels=piece, use_cache=False).loss
        optimiser.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimiser.step()
        if step % 25 == 24 or step == steps - 1:
            last = loss.detach()
            text = f"{name}: step {step + 1} of {steps}, loss {float(last):.3f}"
            print(text, file=sys.stderr, flush=True)
    net.eval()
    return time.process_time() - start


def _schedule(step: int, steps: int) -> float:
    """Rise over a twentieth of the steps, then fall along a cosine to a tenth."""
    warm = max(1, steps // 20)
    if step < warm:
        return (step + 1) / warm
    return 0.1 + 0.45 * (1 + math.cos(math.pi * (step - warm) / (steps - warm)))


def kept(folder: Path) -> LlamaForCausalLM | None:
    """Return the model that an earlier run wrote to ``folder``, or None."""
    if not (folder / "config.json").exists():
        return None
    return LlamaForCausalLM.from_pretrained(folder).eval()


@torch.no_grad()
def loss_of(net: Any, blocks: Tensor) -> float:
    """Return the mean loss of all bytes but each first, in nats; blocks [N, S].

    Blocks are read in pieces as long as those of the training: no model has learnt
    what positions beyond them mean.
    """
    total, blocks = 0.0, blocks.reshape(-1, LENGTH)
    for rows in blocks.split(16):
        logits = net(rows, use_cache=False).logits[:, :-1].float()
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), rows[:, 1:].flatten(), reduction="sum"
        )
        total += float(loss)
    return total / (blocks.shape[0] * (blocks.shape[1] - 1))
