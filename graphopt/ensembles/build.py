"""`ensemble`: put a large model and small ones together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import nn

from graphopt.ensembles.model import Ensemble
from graphopt.errors import ConfigError

Models = nn.Module | Sequence[nn.Module]


def ensemble(
    base: nn.Module,
    tuned: Models,
    reference: Models,
    beta: float = 1.0,
    *,
    weights: Sequence[float] | None = None,
    top_p: float | None = None,
    top_p_of: Literal["base", "combined"] = "base",
) -> Ensemble:
    """Return one module: base + beta * sum_i w_i (tuned_i - reference_i), by logits.

    ``base``: the large model; ``tuned``: a small model that was fine-tuned, or several;
    ``reference``: what each was before (one for all, or one each). All are causal
    language models of transformers that share a tokenizer; vocabularies may differ in
    padding and are cut to the tokens that all have. A model that is given twice runs
    once. ``weights`` are one for each pair, equal shares of 1 when left out.

    ``top_p``: keep the likeliest tokens of so much mass: of the ``base`` before
    combining, at temperature 1 and in every mode of `generate` (emulated fine-tuning),
    or of the ``combined`` distribution, as the default of `generate`'s own option when
    it samples (proxy-tuning).

    Sources: Mitchell et al. 2023 (emulated fine-tuning, equation 4), Liu et al. 2024
    (proxy-tuning). Raises ConfigError for models or numbers that do not fit together.
    """
    first = _models(tuned)
    second = _models(reference)
    second = second * len(first) if len(second) == 1 else second
    if not first or len(first) != len(second):
        raise ConfigError(
            f"ensemble: {len(first)} tuned models and {len(second)} references; give "
            "one reference for all, or one for each"
        )
    shares = [1 / len(first)] * len(first) if weights is None else list(weights)
    if len(shares) != len(first):
        raise ConfigError(
            f"ensemble: {len(shares)} weights for {len(first)} pairs; give one each"
        )
    _check_share(top_p, top_p_of)
    members, places = _distinct([base, *first, *second])
    _check_members(members)
    pairs = list(zip(places[1 : 1 + len(first)], places[1 + len(first) :], strict=True))
    of_base = top_p if top_p_of == "base" else None
    made = Ensemble(members, pairs, torch.tensor(shares), beta, of_base)
    if top_p is not None and top_p_of == "combined":
        made.generation_config.top_p = top_p
    return made


def _models(given: Models) -> list[nn.Module]:
    return [given] if isinstance(given, nn.Module) else list(given)


def _distinct(models: Sequence[nn.Module]) -> tuple[list[nn.Module], list[int]]:
    """Return each model once, and the place of every given one among them."""
    members = list({id(m): m for m in models}.values())
    order = {id(m): i for i, m in enumerate(members)}
    return members, [order[id(m)] for m in models]


def _check_share(top_p: float | None, top_p_of: str) -> None:
    if top_p is not None and not 0 < top_p <= 1:
        raise ConfigError(f"ensemble: top_p = {top_p}; give a share above 0, up to 1")
    if top_p_of not in ("base", "combined"):
        raise ConfigError(
            f"ensemble: top_p_of = '{top_p_of}'; allowed: 'base', 'combined'"
        )


def _check_members(members: Sequence[nn.Module]) -> None:
    for member in members:
        name = type(member).__name__
        if not callable(getattr(member, "can_generate", None)):
            raise ConfigError(f"ensemble: {name} is no language model of transformers")
        config: Any = getattr(member, "config", None)
        if getattr(config, "is_encoder_decoder", False) or not member.can_generate():  # type: ignore[operator]
            raise ConfigError(f"ensemble: {name} is no causal language model")
    places = {str(next(m.parameters()).device) for m in members}
    if len(places) > 1:
        raise ConfigError(
            f"ensemble: members lie on {', '.join(sorted(places))}; move all to one "
            "device"
        )
