"""Exact speculative decoding: a small tuned model drafts, the ensemble verifies."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from graphopt.ensembles.model import Ensemble
from graphopt.ensembles.rows import crop_rows
from graphopt.errors import ConfigError
from graphopt.ops.logits.sample import draw


@dataclass
class SpeculativeOutput:
    """``sequences`` [B, S + N], and how many drafted tokens of how many were taken."""

    sequences: Tensor
    rounds: int = 0
    drafted: int = 0
    accepted: int = 0


@dataclass
class _Reader:
    """A member, what its cache holds, and which of that is padding."""

    member: Any
    cache: Any
    mask: Tensor

    def read(self, ids: Tensor) -> Tensor:
        """Append ids [B, S]; return the logits behind each, float32 [B, S, V]."""
        self.mask = torch.cat([self.mask, self.mask.new_ones(ids.shape)], 1)
        positions = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        return self.member(
            input_ids=ids,
            attention_mask=self.mask,
            position_ids=positions,
            past_key_values=self.cache,
            use_cache=True,
        ).logits.float()

    def begin(self, ids: Tensor) -> Tensor:
        """Read a prompt [B, S], padded on the left; return the logits behind it."""
        return (
            self.member(
                input_ids=ids,
                attention_mask=self.mask,
                position_ids=(self.mask.cumsum(1) - 1).clamp(min=0),
                past_key_values=self.cache,
                use_cache=True,
                logits_to_keep=1,
            )
            .logits[:, -1]
            .float()
        )

    def forget(self, removed: Tensor) -> None:
        """Crop the last ``removed`` [B] tokens of each row."""
        self.mask = crop_rows(self.cache, self.mask, removed)


@dataclass
class _State:
    """What a generation has so far; ``last`` [B] is in no cache yet."""

    readers: list[_Reader]
    last: Tensor
    new: list[list[int]]


@torch.no_grad()
def speculate(
    model: Ensemble,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int,
    block: int = 4,
    temperature: float = 1.0,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int = 0,
    prompts: Sequence[tuple[Tensor, Tensor | None] | None] | None = None,
    generator: torch.Generator | None = None,
) -> SpeculativeOutput:
    """Generate from the ensemble's own distribution, several tokens a large forward.

    The first tuned member drafts ``block`` tokens; one forward of every other member
    judges them, and rejection keeps exactly the ensemble's distribution (Leviathan et
    al. 2023, algorithm 1; Mitchell et al. 2023, section 4.5): a drafted token is taken
    with probability min(1, p / q), else drawn from what p has beyond q. The ensemble's
    beta, weights and filter of the base hold. Rows accept different numbers of tokens:
    their caches are cropped row by row.

    input_ids [B, S], padded on the left; ``prompts``: (ids, mask) of members that read
    their own, by place. ``temperature`` of 0 takes the likeliest tokens. Raises
    ConfigError for a block or temperature out of range.
    """
    if block < 1 or temperature < 0 or max_new_tokens < 1:
        raise ConfigError(
            f"speculate: block = {block}, temperature = {temperature}, max_new_tokens ="
            f" {max_new_tokens}; give at least 1, 0 and 1"
        )
    shared = (input_ids, attention_mask)
    state = _begin(model, shared, prompts, temperature, generator)
    found = SpeculativeOutput(input_ids)
    ends = {eos_token_id} if isinstance(eos_token_id, int) else set(eos_token_id or ())
    while any(not _done(row, max_new_tokens, ends) for row in state.new):
        tokens, taken = _round(model, state, block, temperature, generator)
        for row, ids, count in zip(
            state.new, tokens.tolist(), taken.tolist(), strict=True
        ):
            if not _done(row, max_new_tokens, ends):
                row += ids[: count + 1]
                found.drafted += block
                found.accepted += count
        found.rounds += 1
    rows = [_ended(row, max_new_tokens, ends) for row in state.new]
    width = max(map(len, rows))
    padded = [row + [pad_token_id] * (width - len(row)) for row in rows]
    found.sequences = torch.cat([input_ids, input_ids.new_tensor(padded)], 1)
    return found


def _begin(
    model: Ensemble,
    shared: tuple[Tensor, Tensor | None],
    prompts: Sequence[tuple[Tensor, Tensor | None] | None] | None,
    temperature: float,
    generator: torch.Generator | None,
) -> _State:
    """Read all prompts; the first token comes from the logits behind them."""
    readers, logits = [], []
    cache = model.new_cache()
    for place, member in enumerate(model.members):
        ids, seen = (prompts[place] if prompts else None) or shared
        mask = torch.ones_like(ids) if seen is None else seen
        readers.append(_Reader(member, cache.members[place], mask))
        logits.append(readers[-1].begin(ids))
    first = _draw(_odds(model.combine(logits), temperature), generator)
    return _State(readers, first, [[token] for token in first.tolist()])


def _round(
    model: Ensemble,
    state: _State,
    block: int,
    temperature: float,
    generator: torch.Generator | None,
) -> tuple[Tensor, Tensor]:
    """Return tokens [B, block + 1] and how many of the drafted ones were taken [B]."""
    drafter = model.pairs[0][0]
    drafted, own = [state.last], []
    for _ in range(block + 1):  # the last only to keep its cache level with the others
        own.append(state.readers[drafter].read(drafted[-1][:, None])[:, -1])
        shared = own[-1][:, : model.vocabulary]
        drafted.append(_draw(_odds(shared, temperature), generator))
    ids = torch.stack(drafted[:-1], 1)
    logits = [
        torch.stack(own, 1) if place == drafter else reader.read(ids)
        for place, reader in enumerate(state.readers)
    ]
    target = _odds(model.combine(logits), temperature)
    drafts = _odds(torch.stack(own, 1)[..., : target.shape[-1]], temperature)
    taken, following = _accept(target, drafts, ids[:, 1:], generator)
    tokens = torch.cat([ids[:, 1:], following[:, None]], 1)
    tokens[torch.arange(len(tokens)), taken] = following
    for reader in state.readers:
        reader.forget(block - taken)
    state.last = following
    return tokens, taken


def _odds(logits: Tensor, temperature: float) -> Tensor:
    """Return probabilities in float64, of one token where the temperature is 0."""
    if temperature == 0:
        best = logits.argmax(-1, keepdim=True)
        return torch.zeros_like(logits, dtype=torch.float64).scatter(-1, best, 1.0)
    return (logits.double() / temperature).softmax(-1)


def _accept(
    target: Tensor, drafts: Tensor, ids: Tensor, generator: torch.Generator | None
) -> tuple[Tensor, Tensor]:
    """Return how many of ids [B, K] are taken [B], and the token that follows [B].

    target and drafts: probabilities [B, K + 1, V] before each id and behind the last.
    """
    wanted, had = (
        odds[:, :-1].gather(-1, ids[..., None])[..., 0] for odds in (target, drafts)
    )
    numbers = torch.rand(ids.shape, generator=generator, dtype=torch.float64)
    kept = numbers.to(ids.device) * had < wanted
    taken = kept.long().cumprod(1).sum(1)
    rows = torch.arange(len(ids), device=ids.device)
    p, q = target[rows, taken], drafts[rows, taken]
    beyond = (p - q).clamp(min=0)
    # Behind the last one there is no draft; rounding may leave nothing beyond one.
    whole = (taken == ids.shape[1]) | (beyond.sum(-1) <= 0)
    return taken, _draw(torch.where(whole[:, None], p, beyond), generator)


def _draw(odds: Tensor, generator: torch.Generator | None) -> Tensor:
    numbers = torch.rand(len(odds), generator=generator, dtype=torch.float64)
    return draw(odds, numbers.to(odds.device))


def _ended(row: list[int], most: int, ends: set[int]) -> list[int]:
    """Return a row up to its end token or its limit."""
    stops = [i + 1 for i, token in enumerate(row[:most]) if token in ends]
    return row[: stops[0] if stops else most]


def _done(row: list[int], most: int, ends: set[int]) -> bool:
    return len(row) >= most or bool(ends.intersection(row))
