"""What MustDrop and baselines on vision tokens do, row by row in eager attention."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypeVar

import torch
from torch import nn

from graphopt.ops.tokens import spread_scores
from tests.vision_configs import IMAGE, SIDE


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
        if method in ("uniform", "pool"):
            stay = len(seen) - drop
            n = len(seen)
            order = [
                place
                for i, place in enumerate(seen)
                if (i + 1) * stay // n == i * stay // n
            ]
        gone = {self.alive[i] for i in order[:drop]}
        if method == "pool":
            self.pool([self.alive[i] for i in seen], gone)
        self.alive = [p for p in self.alive if p not in gone]

    def pool(self, places: list[int], gone: set[int]) -> None:
        """Let those that stay be means of themselves and those that go in front."""
        run: list[int] = []
        for place in places:
            run.append(place)
            if place not in gone:
                self.hidden[place] = self.hidden[run].mean(0)
                run = []

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

    def passing(self, thresholds: tuple[float, float], keys: set[int]) -> int:
        """Return how many tokens MustDrop's two conditions leave."""
        seen = [i for i, p in enumerate(self.alive) if self.vision[p]]
        if not seen:
            return len(self.alive)
        text = self.paid.mean(0)[seen[-1] + 1 :][:, seen]
        summed, most = text.sum(0), text.amax(0)
        under = (summed < thresholds[0] * summed.sum()) & (most < thresholds[1])
        pairs = zip(under, seen, strict=True)
        goes = [bool(u) and self.alive[i] not in keys for u, i in pairs]
        return len(self.alive) - sum(goes)

    def logits(self) -> torch.Tensor:
        """Return the prediction behind the last token, [V]."""
        return self.head(self.base.norm(self.hidden[self.alive[-1]]))


_Kind = TypeVar("_Kind", bound=Row)


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


def chosen_windows(
    model: Any, pixel_values: torch.Tensor, count: int, least: float = -2.0
) -> list[list[list[int]]]:
    """Return the patches of the 3 x 3 windows that merge, of each image.

    The ``count`` most alike behind the encoder's first layer, equally many in all
    images: fewer where an image has fewer whose mean cosine is at least ``least``.
    """
    with torch.no_grad():
        out = model.model.vision_tower(pixel_values, output_hidden_states=True)
    corners = [(y, x) for y in range(0, SIDE - 2, 3) for x in range(0, SIDE - 2, 3)]
    cells = [
        [(y + i) * SIDE + x + j for i in range(3) for j in range(3)] for y, x in corners
    ]
    images, numbers = [], []
    for patches in out.hidden_states[1][:, 1:]:
        alike = []
        for window in cells:
            cosine = torch.nn.functional.cosine_similarity
            pairs = [
                cosine(patches[i], patches[j], dim=0)
                for i in window
                for j in window
                if i != j
            ]
            alike.append(float(sum(pairs) / len(pairs)))
        order = sorted(range(len(cells)), key=lambda w: -alike[w])
        numbers.append(sum(value >= least for value in alike))
        images.append([cells[w] for w in order])
    number = min(count, *numbers)
    return [windows[:number] for windows in images]


@torch.no_grad()
def merged(
    model: Any, inputs: dict[str, Any], windows: list[list[list[int]]]
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return embeddings [B, S, H] with merged patches, and which places go [B, S]."""
    ids, base = inputs["input_ids"], model.model
    out = base.vision_tower(inputs["pixel_values"], output_hidden_states=True)
    selected = out.hidden_states[model.config.vision_feature_layer][:, 1:].clone()
    away = torch.zeros(selected.shape[:2], dtype=torch.bool)
    for image, chosen in enumerate(windows):
        for cells in chosen:
            selected[image, cells[4]] = selected[image, cells].mean(0)
            away[image, cells] = True
            away[image, cells[4]] = False
    hidden = base.get_input_embeddings()(ids)
    hidden[ids == IMAGE] = base.multi_modal_projector(selected).flatten(0, 1)
    gone = torch.zeros_like(ids, dtype=torch.bool)
    gone[ids == IMAGE] = away.flatten()
    return hidden, gone


def key_set(
    model: Any,
    pixel_values: torch.Tensor,
    share: float,
    windows: list[list[list[int]]] | None = None,
    of_all: bool = False,
) -> torch.Tensor:
    """Return which patches the class token attends to most, bool [N, P].

    They are among those that merging leaves, and so many of them, or of all.
    """
    with torch.no_grad():
        out = model.model.vision_tower(pixel_values, output_attentions=True)
    layer = model.config.vision_feature_layer  # of hidden states, embeddings first
    paid = out.attentions[layer].mean(1)[:, 0, 1:]
    found = torch.zeros_like(paid, dtype=torch.bool)
    for row, image in enumerate(paid):
        gone = {c for w in (windows or [[]] * len(paid))[row] for c in w if c != w[4]}
        left = [i for i in range(len(image)) if i not in gone]
        best = sorted(left, key=lambda i: -float(image[i]))
        number = len(image) if of_all else len(left)
        found[row, best[: math.ceil(share * number)]] = True
    return found


@dataclass
class Rule:
    """What a prompt's run does: ``plan`` are layers and the shares of the vision
    tokens that live behind them; ``keys`` [F] marks features that never go."""

    plan: Sequence[tuple[int, Fraction]]
    method: str = "must"
    thresholds: tuple[float, float] = (0.001, 0.001)
    keys: torch.Tensor | None = None
    windows: list[list[list[int]]] | None = None
    by_threshold: bool = False


@torch.no_grad()
def run_rows(
    model: Any, inputs: dict[str, Any], rule: Rule
) -> tuple[torch.Tensor, list[list[int]]]:
    """Return the last logits [B, V] and the places alive at the end, of each row."""
    rows = passed_rows(model, inputs, rule, Row)
    return torch.stack([one.logits() for one in rows]), [one.alive for one in rows]


def passed_rows(
    model: Any, inputs: dict[str, Any], rule: Rule, kind: type[_Kind]
) -> list[_Kind]:
    """Return the rows of a prompt, of class ``kind``, behind the last layer."""
    ids = inputs["input_ids"]
    real = inputs.get("attention_mask", torch.ones_like(ids)).bool()
    hidden, gone = embeddings(model, inputs), torch.zeros_like(real)
    if rule.windows is not None:
        hidden, gone = merged(model, inputs, rule.windows)
    marked = torch.zeros_like(real)
    if rule.keys is not None:
        marked[ids == IMAGE] = rule.keys
    given = inputs.get("position_ids")
    rows = []
    for row in range(len(ids)):
        positions = torch.arange(ids.shape[1]) if given is None else given[:, row]
        places = (real[row] & ~gone[row]).nonzero()[:, 0].tolist()
        rows.append(kind(model, hidden[row], positions, ids[row], places))
    vision = int((ids == IMAGE).sum()) // len(ids)
    text = ids.shape[1] - vision
    behind = dict(rule.plan)
    for index in range(len(rows[0].base.layers)):
        for one in rows:
            one.layer(index)
        if index not in behind:
            continue
        keys = [set(line.nonzero()[:, 0].tolist()) for line in marked]
        count = text + math.ceil(behind[index] * vision)
        if rule.by_threshold:
            pairs = zip(rows, keys, strict=True)
            count = max(one.passing(rule.thresholds, kept) for one, kept in pairs)
        for one, kept in zip(rows, keys, strict=True):
            one.keep(count, rule.method, rule.thresholds, kept)
    return rows
