"""What MustDrop and baselines on vision tokens do, row by row in eager attention."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import torch
from torch import nn

from graphopt.ops.tokens import spread_scores
from tests.vision_configs import IMAGE


def eager(model: nn.Module) -> Any:
    """Return a copy of a model whose attention gives its weights."""
    twin: Any = copy.deepcopy(model)
    twin.set_attn_implementation("eager")
    return twin


def embeddings(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """Return what the language model gets for a prompt, [B, S, H]."""
    found: list[torch.Tensor] = []
    language = model.model.language_model
    hook = language.register_forward_pre_hook(
        lambda _module, _args, kwargs: found.append(kwargs["inputs_embeds"]),
        with_kwargs=True,
    )
    with torch.no_grad():
        model(**inputs, use_cache=False)
    hook.remove()
    return found[0]


class Row:
    """One row of a prompt on its way through the layers; ``alive`` are its places."""

    def __init__(self, model: Any, hidden: torch.Tensor, positions: torch.Tensor,
                 ids: torch.Tensor, places: list[int]) -> None:  # fmt: skip
        self.base, self.head = model.model.language_model, model.lm_head
        self.hidden, self.positions = hidden, positions
        self.vision = ids == IMAGE
        self.alive = places
        self.paid = torch.empty(0)
        self.first: dict[int, float] = {}

    def layer(self, index: int) -> None:
        """Run one layer on the living tokens; keep its attention, [H, n, n]."""
        layer, n = self.base.layers[index], len(self.alive)
        hidden = self.hidden[None, self.alive]
        rotary = self.base.rotary_emb(hidden, self.positions[..., None, self.alive])
        mask = torch.full((n, n), float("-inf"), dtype=hidden.dtype).triu(1)
        states = layer.input_layernorm(hidden)
        given = {"attention_mask": mask[None, None], "position_embeddings": rotary}
        self.paid = layer.self_attn(states, **given)[1][0]
        out = layer(hidden, **given)
        out = out[0] if isinstance(out, tuple) else out
        self.hidden = self.hidden.clone()
        self.hidden[self.alive] = out[0]

    def keep(self, count: int, method: str, thresholds: tuple[float, float],
             keys: set[int]) -> None:  # fmt: skip
        """Let the worst vision tokens go until ``count`` tokens are left."""
        drop = len(self.alive) - count
        if drop <= 0:
            return
        seen = [i for i, p in enumerate(self.alive) if self.vision[p]]
        values = self.values(method, thresholds, seen)
        order = sorted(
            seen, key=lambda i: (self.alive[i] in keys, values[self.alive[i]], -i)
        )
        if method == "uniform":
            stay = len(seen) - drop
            n = len(seen)
            order = [
                place
                for i, place in enumerate(seen)
                if (i + 1) * stay // n == i * stay // n
            ]
        gone = {self.alive[i] for i in order[:drop]}
        self.alive = [p for p in self.alive if p not in gone]

    def values(
        self, method: str, thresholds: tuple[float, float], seen: list[int]
    ) -> dict[int, float]:
        """Return the value of each living vision token, by place."""
        if method in ("fastv", "random") and self.first:
            return self.first
        mean = self.paid.mean(0) if len(self.paid) else self.paid
        if method == "must":
            found = dual(mean, seen, thresholds)
        elif method == "random":
            spread = spread_scores(torch.empty(1, len(self.vision), 1), 0)[0]
            found = {i: float(spread[self.alive[i]]) for i in seen}
        else:
            found = {i: float(mean[-1, i]) for i in seen}
        self.first = {self.alive[i]: value for i, value in found.items()}
        return self.first

    def logits(self) -> torch.Tensor:
        """Return the prediction behind the last token, [V]."""
        return self.head(self.base.norm(self.hidden[self.alive[-1]]))


def dual(
    mean: torch.Tensor, seen: Sequence[int], thresholds: tuple[float, float]
) -> dict[int, float]:
    """Return how far tokens are over the nearer of MustDrop's thresholds."""
    rows = list(range(seen[-1] + 1, mean.shape[0]))
    text = mean[rows][:, list(seen)]
    summed, most = text.sum(0), text.amax(0)
    share, top = thresholds
    return {
        i: max(float(summed[n] / (share * summed.sum())), float(most[n] / top))
        for n, i in enumerate(seen)
    }


def key_set(model: Any, pixel_values: torch.Tensor, share: float) -> torch.Tensor:
    """Return which patches the class token attends to most, bool [N, P]."""
    with torch.no_grad():
        out = model.model.vision_tower(pixel_values, output_attentions=True)
    layer = model.config.vision_feature_layer  # of hidden states, embeddings first
    paid = out.attentions[layer].mean(1)[:, 0, 1:]
    found = torch.zeros_like(paid, dtype=torch.bool)
    for row, image in enumerate(paid):
        best = image.topk(math.ceil(share * len(image))).indices
        found[row, best] = True
    return found


@torch.no_grad()
def run_rows(
    model: Any,
    inputs: dict[str, Any],
    plan: Sequence[tuple[int, Fraction]],
    method: str = "must",
    thresholds: tuple[float, float] = (0.001, 0.001),
    keys: torch.Tensor | None = None,
) -> tuple[torch.Tensor, list[list[int]]]:
    """Return the last logits [B, V] and the places alive at the end, of each row.

    ``plan`` are layers and the shares of the vision tokens that live behind them;
    ``keys`` [F] marks the written features that never go.
    """
    ids, hidden = inputs["input_ids"], embeddings(model, inputs)
    real = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    vision = int((ids == IMAGE).sum()) // len(ids)
    given = inputs.get("position_ids")
    marked = torch.zeros_like(real)
    if keys is not None:
        marked[ids == IMAGE] = keys
    logits, alive = [], []
    for row in range(len(ids)):
        places = real[row].nonzero()[:, 0].tolist()
        positions = torch.arange(ids.shape[1]) if given is None else given[:, row]
        one = Row(model, hidden[row], positions, ids[row], places)
        tokens, shares = ids.shape[1], [Fraction(1), *(s for _, s in plan)]
        kept = set(marked[row].nonzero()[:, 0].tolist())
        behind = {layer: i for i, (layer, _) in enumerate(plan)}
        for index in range(len(one.base.layers)):
            one.layer(index)
            if index in behind:
                i = behind[index]
                tokens -= math.ceil(shares[i] * vision)
                tokens += math.ceil(shares[i + 1] * vision)
                one.keep(tokens, method, thresholds, kept)
        logits.append(one.logits())
        alive.append(one.alive)
    return torch.stack(logits), alive
