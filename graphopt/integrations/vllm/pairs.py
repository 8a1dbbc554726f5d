"""The small models of logit arithmetic: read, checked and loaded."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError

from graphopt.ensembles.config import EnsembleConfig, Member, beside, read_config
from graphopt.errors import ConfigError

_WHOLE = Member(model="")


@dataclass(frozen=True)
class Pairs:
    """An ensemble whose base is what vLLM serves; ``origin`` is where it was read."""

    config: EnsembleConfig
    origin: str
    served: str

    @property
    def weights(self) -> torch.Tensor:
        """Return the pairs' weights, float32 [P]: as given, or equal shares of 1."""
        found = [p.weight for p in self.config.pair]
        equal = 1 / len(found)
        return torch.tensor([equal if w is None else w for w in found])

    def load(self, dtype: torch.dtype) -> tuple[list[Any], list[tuple[int, int]]]:
        """Return the small models, each once, and (tuned, reference) of each pair.

        Raises ConfigError where a model has other tokens than the one served,
        ModelError where one is missing.
        """
        members = [m for p in self.config.pair for m in (p.tuned, p.reference)]
        known: dict[tuple[str, str | None], Any] = {}
        for member in members:
            key = (member.model, member.adapter)
            if key not in known:
                known[key] = self._load(member, dtype)
        order = {key: place for place, key in enumerate(known)}
        places = [order[m.model, m.adapter] for m in members]
        return list(known.values()), list(zip(places[::2], places[1::2], strict=True))

    def _load(self, member: Member, dtype: torch.dtype) -> Any:
        from graphopt.ensembles.lora import with_adapter
        from graphopt.models import load, load_tokenizer

        found = load(beside(self.origin, member.model), dtype)
        own = load_tokenizer(self.served).get_vocab()
        if found.tokenizer is not None and found.tokenizer.get_vocab() != own:
            raise ConfigError(
                f"{self.origin}: {member.model} has other tokens than {self.served}; "
                "logits can be added only of models that share a tokenizer"
            )
        if member.adapter is None:
            return found.model
        return with_adapter(found.model, beside(self.origin, member.adapter))


def read_pairs(given: object, served: str) -> Pairs:
    """Read an ensemble's file, or a table of the same keys without ``base``.

    The base is what vLLM serves; that of a file is not loaded. Raises ConfigError.
    """
    if isinstance(given, (str, Path)):
        return _checked(Pairs(read_config(given), str(given), served))
    if not isinstance(given, Mapping):
        raise ConfigError(f"'ensemble' is the path of a file or a table, not {given!r}")
    origin = "additional_config"
    try:
        config = EnsembleConfig.model_validate({"base": {"model": served}, **given})
    except ValidationError as error:
        first = error.errors()[0]
        key = ".".join(str(part) for part in first["loc"])
        raise ConfigError(f"{origin}: ensemble: '{key}': {first['msg']}") from None
    return _checked(Pairs(config, origin, served))


def _checked(pairs: Pairs) -> Pairs:
    config = pairs.config
    members = [config.base, *(m for p in config.pair for m in (p.tuned, p.reference))]
    if any(m.chat or m.prompt != _WHOLE.prompt for m in members):
        raise ConfigError(
            f"{pairs.origin}: prompts of members' own (chat, prompt) cannot be had: "
            "vLLM hands all the request's tokens"
        )
    weights = [p.weight for p in config.pair]
    if None in weights and any(w is not None for w in weights):
        raise ConfigError(f"{pairs.origin}: give a weight to every pair, or to none")
    if config.base.adapter is not None:
        raise ConfigError(f"{pairs.origin}: vLLM serves the base: it has no adapter")
    if config.top_p is not None and config.top_p_of == "combined":
        raise ConfigError(
            f"{pairs.origin}: top_p of the combined distribution is a parameter of "
            "each request in vLLM; leave it out, or use top_p_of = 'base'"
        )
    return pairs
