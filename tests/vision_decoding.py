"""Decoding over what each layer kept of a prompt with images, in eager layers."""

from __future__ import annotations

from typing import Any

import torch
from transformers import DynamicCache

from tests.vision_oracle import Row, Rule, passed_rows


class DecodingRow(Row):
    """A row whose layers keep keys; ``held`` are the places that each of them has.

    Positions count from the first token behind the padding, as `generate` has them.
    """

    def __init__(self, *given: Any) -> None:
        super().__init__(*given)
        self.cache = DynamicCache()
        self.start = self.alive[0]
        self.positions = self.positions - self.start
        self.held: dict[int, list[int]] = {}

    def layer(self, index: int) -> None:
        """Run one layer on the living tokens; keep its attention and its keys."""
        self.held[index] = list(self.alive)
        positions = self.positions[self.alive][None]
        out = self._run(index, self.hidden[None, self.alive], positions)
        self.hidden = self.hidden.clone()
        self.hidden[self.alive] = out[0]

    def compact(self) -> None:
        """Keep in every layer what lives to the end."""
        for index, layer in enumerate(self.cache.layers):
            pairs = enumerate(self.held[index])
            stay = [i for i, place in pairs if place in self.alive]
            layer.keys, layer.values = layer.keys[:, :, stay], layer.values[:, :, stay]
            self.held[index] = list(self.alive)

    def decode(self, token: torch.Tensor, place: int) -> torch.Tensor:
        """Return the logits [V] behind one more token, at position ``place``."""
        hidden = self.base.get_input_embeddings()(token[None, None])
        for index in range(len(self.base.layers)):
            hidden = self._run(index, hidden, torch.tensor([[place]]))
        return self.head(self.base.norm(hidden[0, -1]))

    def _run(
        self, index: int, hidden: torch.Tensor, positions: torch.Tensor
    ) -> torch.Tensor:
        layer, n = self.base.layers[index], hidden.shape[1]
        mask = torch.full((n, n), float("-inf"), dtype=hidden.dtype).triu(1)
        attended, weights = layer.self_attn(
            layer.input_layernorm(hidden),
            position_embeddings=self.base.rotary_emb(hidden, positions),
            attention_mask=mask[None, None] if n > 1 else None,
            past_key_values=self.cache,
        )
        self.paid = weights[0]
        hidden = hidden + attended
        return hidden + layer.mlp(layer.post_attention_layernorm(hidden))


@torch.no_grad()
def greedy(
    model: Any, inputs: dict[str, Any], rule: Rule, steps: int, final: bool
) -> tuple[torch.Tensor, list[list[int]]]:
    """Return logits [B, steps, V] of greedy decoding, and tokens held, [layer][row].

    ``final`` compacts every layer, behind the prompt, to the tokens alive at the end.
    """
    rows = passed_rows(model, inputs, rule, DecodingRow)
    found = []
    for row in rows:
        logits = [row.logits()]
        if final:
            row.compact()
        for step in range(steps - 1):
            place = inputs["input_ids"].shape[1] - row.start + step
            logits.append(row.decode(logits[-1].argmax(), place))
        found.append(torch.stack(logits))
    layers = range(len(rows[0].held))
    held = [[len(row.held[i]) + steps - 1 for row in rows] for i in layers]
    return torch.stack(found), held
