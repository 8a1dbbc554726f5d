"""An executor that runs each piece by itself through a transformers model.

Its keys and values lie in real pages: a wrong page number gives wrong tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import transformers as tf
from torch import Tensor, nn

from graphopt.runtime.engine import Piece

VOCABULARY = 64


@cache
def tiny_llama() -> nn.Module:
    """Return a random Llama whose greedy tokens depend on all of the prompt."""
    config = tf.LlamaConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=VOCABULARY,
        max_position_embeddings=4096,
        initializer_range=0.6,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="eager",
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return tf.LlamaForCausalLM(config).double().eval()


class DenseExecutor:
    """Pages of ``page_size`` tokens: [layers, pages, heads, page_size, head_dim]."""

    def __init__(self, pages: int, page_size: int = 64) -> None:
        self.pages, self.page_size = pages, page_size
        self.model = tiny_llama()
        config = self.model.config
        heads, width = config.num_key_value_heads, 8
        shape = (config.num_hidden_layers, pages, heads, page_size, width)
        # NaN: a page that is read before it is written spoils the tokens.
        self.keys = torch.full(shape, torch.nan, dtype=torch.float64)
        self.values = self.keys.clone()

    @torch.no_grad()
    def run(self, pieces: Sequence[Piece]) -> Tensor:
        rows = [self._piece(piece) for piece in pieces]
        kept = [row for row, piece in zip(rows, pieces, strict=True) if piece.samples]
        return torch.stack(kept) if kept else torch.empty(0, VOCABULARY)

    def _piece(self, piece: Piece) -> Tensor:
        past, end = piece.past, piece.past + len(piece.tokens)
        held = tf.DynamicCache()
        for layer in range(len(self.keys)) if past else ():
            key, value = (
                _read(pool[layer], piece.pages, past)
                for pool in (self.keys, self.values)
            )
            held.update(key, value, layer)
        logits = self.model(
            torch.tensor([piece.tokens]),
            past_key_values=held,
            position_ids=torch.arange(past, end)[None],
            logits_to_keep=1,
        ).logits
        for layer, states in enumerate(held.layers):
            self._write(self.keys[layer], states.keys, piece)
            self._write(self.values[layer], states.values, piece)
        return logits[0, -1]

    def _write(self, pool: Tensor, states: Tensor, piece: Piece) -> None:
        at = torch.arange(piece.past, piece.past + len(piece.tokens))
        page = torch.tensor(piece.pages)[at // self.page_size]
        pool[page, :, at % self.page_size] = states[0, :, piece.past :].transpose(0, 1)


def _read(pool: Tensor, pages: Sequence[int], past: int) -> Tensor:
    """Return the first ``past`` tokens [1, H, past, D] of pages [P, H, size, D]."""
    gathered = pool[torch.tensor(pages)].transpose(0, 1).flatten(1, 2)
    return gathered[None, :, :past]


def generated(
    prompt: Sequence[int], new: int, seed: int | None = None, **options: object
) -> list[int]:
    """Return what ``generate`` returns behind the prompt; sampled with a seed."""
    sampled = {} if seed is None else {"do_sample": True, "top_k": 0}
    with torch.random.fork_rng():
        torch.manual_seed(seed or 0)
        given: dict[str, object] = {
            "max_new_tokens": new,
            "pad_token_id": 0,
            "do_sample": False,
        }
        ids = torch.tensor([list(prompt)])
        # Without a mask, generate takes a zero in the prompt for padding.
        given["attention_mask"] = torch.ones_like(ids)
        tokens = tiny_llama().generate(ids, **{**given, **sampled, **options})
    return tokens[0, len(prompt) :].tolist()
