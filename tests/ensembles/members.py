"""Tiny members of ensembles: one architecture wide and narrow, with one tokenizer."""

from __future__ import annotations

import torch
import transformers as tf

import graphopt

SAMPLING = {"do_sample": True, "top_k": 0}
LENGTHS = {"max_new_tokens": 8, "pad_token_id": 0, "eos_token_id": 2}


def llama(hidden=32, vocab=100, layers=2, seed=0, **more):
    """A random model with logits that differ enough to sample from."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = tf.LlamaConfig(
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            vocab_size=vocab,
            initializer_range=0.15,
            **more,
        )
        return tf.LlamaForCausalLM(config).eval()


def trio(vocab=100, layers=2, **options):
    """An ensemble whose tuned member pads its vocabulary."""
    base = llama(64, vocab, layers)
    tuned, small = llama(32, vocab + 4, layers, 1), llama(32, vocab, layers, 2)
    return graphopt.ensemble(base, tuned, small, **options)


def by_hand(made, ids, mask=None, **own):
    """Combined logits [B, S, V] from the members alone; ``own``: inputs by place."""
    logits = []
    for place, member in enumerate(made.members):
        given = own.get(f"m{place}", {"input_ids": ids, "attention_mask": mask})
        logits.append(member(**given).logits.double())
    length = min(rows.shape[1] for rows in logits)  # prompts end together
    logits = [rows[:, -length:] for rows in logits]
    size = min(rows.shape[-1] for rows in logits)
    found = logits[0][..., :size].clone()
    for weight, (tuned, reference) in zip(made.weights, made.pairs, strict=True):
        step = logits[tuned][..., :size] - logits[reference][..., :size]
        found += float(made.beta) * float(weight) * step
    return found
