"""What the small models make of one request: their caches and their last logits."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from graphopt.errors import GraphoptError
from graphopt.integrations.vllm.pairs import Pairs
from graphopt.ops.logits import combine_logits, nucleus


@dataclass
class Row:
    """The state of one request; ``beta`` None is that of the config."""

    beta: float | None = None
    caches: list[Any] = field(default_factory=list)
    read: list[int] = field(default_factory=list)
    logits: list[Tensor] = field(default_factory=list)


class SmallModels:
    """The small models of an ensemble, with a cache for each request.

    Each row is run by itself: its new tokens only, so a step of decoding is one token a
    model and row.
    """

    def __init__(self, pairs: Pairs, device: torch.device, dtype: torch.dtype) -> None:
        self._config = pairs.config
        members, self._pairs = pairs.load(dtype)
        self._members = [m.to(device).requires_grad_(False) for m in members]
        self._weights = pairs.weights.to(device)

    @torch.no_grad()
    def combine(self, base: Tensor, row: Row, tokens: Sequence[int]) -> Tensor:
        """Return base [V] with what the small models say behind ``tokens``, float32.

        Tokens that not all models have get minus infinity.
        """
        self._read(row, list(tokens), base.device)
        beta = self._config.beta if row.beta is None else row.beta
        found = combine_logits(
            base,
            [row.logits[t] for t, _ in self._pairs],
            [row.logits[r] for _, r in self._pairs],
            self._weights,
            torch.tensor(beta, device=base.device),
        )
        if self._config.top_p is not None:
            kept = nucleus(base[: len(found)].float(), self._config.top_p)
            found = found.masked_fill(~kept, -torch.inf)
        rest = found.new_full((len(base) - len(found),), -torch.inf)
        return torch.cat((found, rest))

    def _read(self, row: Row, tokens: list[int], device: torch.device) -> None:
        """Let the models read what they have not; anew where the tokens differ."""
        if min(tokens, default=-1) < 0:
            raise GraphoptError(
                "ensemble: vLLM runs ahead of the tokens that it has drawn; start it "
                "with --no-async-scheduling"
            )
        if not row.caches or tokens[: len(row.read)] != row.read:
            from transformers import DynamicCache

            row.caches = [DynamicCache() for _ in self._members]
            row.read, row.logits = [], []
        new = tokens[len(row.read) :]
        if new:
            ids = torch.tensor([new], device=device)
            members = zip(self._members, row.caches, strict=True)
            row.logits = [
                m(input_ids=ids, past_key_values=c, use_cache=True).logits[0, -1]
                for m, c in members
            ]
            row.read = tokens
