"""Load what an ensemble's file names, and the prompts that its members read."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from graphopt.ensembles.build import ensemble
from graphopt.ensembles.config import Member, beside, read_config, rendered
from graphopt.ensembles.lora import with_adapter
from graphopt.ensembles.model import Ensemble
from graphopt.errors import ConfigError
from graphopt.models import LoadedModel, load


@dataclass(frozen=True)
class LoadedEnsemble:
    """An ensemble, the tokenizer of its base, and who reads what."""

    model: Ensemble
    tokenizer: Any
    base: Member
    pairs: tuple[tuple[Member, Member], ...]
    tokenizers: dict[str, Any]

    def inputs(self, text: str) -> dict[str, Any]:
        """Return what ``generate`` gets for the prompt ``text``."""
        found: dict[str, Any] = {"inputs": self._ids(self.base, text)}
        for side, name in enumerate(("tuned", "reference")):
            members = [pair[side] for pair in self.pairs]
            own = [self._own(member, text) for member in members]
            if any(ids is not None for ids in own):
                found |= {f"{name}_input_ids": own}
        return found

    def _own(self, member: Member, text: str) -> Tensor | None:
        """Return a prompt that is not the base's, or None."""
        ids, base = self._ids(member, text), self._ids(self.base, text)
        return None if torch.equal(ids, base) else ids

    def _ids(self, member: Member, text: str) -> Tensor:
        full = rendered(member, text, self.tokenizers[member.model])
        special = not member.chat
        ids = self.tokenizer(full, add_special_tokens=special).input_ids
        return torch.tensor([ids], device=self.model.device)


def load_ensemble(
    path: str | Path, dtype: torch.dtype = torch.float32
) -> LoadedEnsemble:
    """Load the models that the file ``path`` names, each once.

    An adapter shares the weights of the model that it is over. Raises ConfigError for a
    bad file and for members with other tokens, ModelError for models that are missing.
    """
    config = read_config(path)
    known: dict[str, LoadedModel] = {}
    adapted: dict[tuple[str, str], torch.nn.Module] = {}

    def module(member: Member) -> torch.nn.Module:
        if member.model not in known:
            known[member.model] = load(beside(path, member.model), dtype)
        plain = known[member.model].model
        if member.adapter is None:
            return plain
        key = (member.model, member.adapter)
        if key not in adapted:
            adapted[key] = with_adapter(plain, beside(path, member.adapter))
        return adapted[key]

    base = module(config.base)
    tuned = [module(p.tuned) for p in config.pair]
    reference = [module(p.reference) for p in config.pair]
    given = [p.weight for p in config.pair]
    weights = None if None in given else [w for w in given if w is not None]
    more: dict[str, Any] = {"top_p": config.top_p, "top_p_of": config.top_p_of}
    made = ensemble(base, tuned, reference, config.beta, weights=weights, **more)
    tokenizers = {name: found.tokenizer for name, found in known.items()}
    own = tokenizers[config.base.model]
    _check_tokens(str(path), config.base.model, tokenizers)
    pairs = tuple((p.tuned, p.reference) for p in config.pair)
    return LoadedEnsemble(made, own, config.base, pairs, tokenizers)


def _check_tokens(path: str, base: str, tokenizers: dict[str, Any]) -> None:
    own = tokenizers[base]
    if own is None:
        raise ConfigError(f"{path}: {base} has no tokenizer beside it")
    for name, other in tokenizers.items():
        if other is None:
            tokenizers[name] = own
        elif other.get_vocab() != own.get_vocab():
            raise ConfigError(
                f"{path}: {name} has other tokens than {base}; logits can be added "
                "only of models that share a tokenizer"
            )
