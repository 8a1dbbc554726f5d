"""Ensembles in TOML files: members, pairs, weights, filter, prompts."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from graphopt.errors import ConfigError, did_you_mean

_PLACE = "{prompt}"


class Member(BaseModel):
    """One model: an alias, a directory, a GGUF file or a hub id.

    ``adapter``: a folder of peft's with a LoRA adapter over that model. ``chat``: put
    the prompt into the chat template of the model's tokenizer. ``prompt``: a text of
    its own around the user's, which goes where it says ``{prompt}``.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    model: str
    adapter: str | None = None
    chat: bool = False
    prompt: str = _PLACE


class Pair(BaseModel):
    """A tuned model, what it was before, and its weight (equal shares of 1)."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    tuned: Member
    reference: Member
    weight: float | None = None


class EnsembleConfig(BaseModel):
    """What `graphopt.ensemble` takes, as a file says it."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    base: Member
    pair: Annotated[list[Pair], Field(min_length=1)]
    beta: float = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_p_of: Literal["base", "combined"] = "base"


def read_config(path: str | Path) -> EnsembleConfig:
    """Read an ensemble's file; models' paths are those beside it where they exist.

    Raises ConfigError with file, key, cause and the nearest right name.
    """
    try:
        data = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot read the ensemble: {error}") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path}: not valid TOML: {error}") from None
    try:
        found = EnsembleConfig.model_validate(data)
    except ValidationError as error:
        raise ConfigError(f"{path}: {_explain(error)}") from None
    _check(path, found)
    return found


def _explain(error: ValidationError) -> str:
    errors = error.errors()  # an unknown key may be the one that is missing
    first = next((e for e in errors if e["type"] == "extra_forbidden"), errors[0])
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        kinds: dict[int, type] = {1: EnsembleConfig, 3: Pair}
        known = kinds.get(len(first["loc"]), Member)
        name = str(first["loc"][-1])
        return f"unknown key '{key}'{did_you_mean(name, known.__annotations__)}"
    if first["type"] == "missing":
        return f"the key '{key}' is missing"
    return f"'{key}': {first['msg']}, not {first['input']!r}"


def _check(path: str | Path, found: EnsembleConfig) -> None:
    members = [found.base, *(m for p in found.pair for m in (p.tuned, p.reference))]
    for member in members:
        if _PLACE not in member.prompt:
            raise ConfigError(
                f"{path}: prompt = {member.prompt!r} does not say where the user's "
                f"goes: write {_PLACE} in it"
            )
    weights = [p.weight for p in found.pair]
    if None in weights and any(w is not None for w in weights):
        raise ConfigError(f"{path}: give a weight to every pair, or to none")


def beside(path: str | Path, name: str) -> str:
    """Return ``name`` as a path beside the file ``path``, where there is such."""
    own = Path(path).parent / name
    return str(own) if own.exists() else name


def rendered(member: Member, text: str, tokenizer: Any) -> str:
    """Return what ``member`` reads for the prompt ``text``."""
    full = member.prompt.replace(_PLACE, text)
    if not member.chat:
        return full
    if not tokenizer.chat_template:
        raise ConfigError(f"{member.model}: chat = true, but it has no chat template")
    message = [{"role": "user", "content": full}]
    return tokenizer.apply_chat_template(
        message, add_generation_prompt=True, tokenize=False
    )
