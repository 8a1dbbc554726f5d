"""The text a search looks at, as token ids."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from graphopt.errors import ConfigError
from graphopt.texts import language_reference


@dataclass(frozen=True)
class Text:
    """A text and where it came from."""

    origin: str
    text: str

    @property
    def digest(self) -> str:
        """Return a short hash that tells texts apart."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:16]

    def ids(self, tokenizer: Any) -> list[int]:
        """Return all its token ids."""
        return list(tokenizer(self.text, add_special_tokens=False).input_ids)

    def excerpt(self, tokenizer: Any, tokens: int, seed: int) -> torch.Tensor:
        """Return ids [1, tokens] from a place that ``seed`` draws.

        Raises ConfigError when the text is too short.
        """
        ids = self.ids(tokenizer)
        if len(ids) < tokens:
            raise ConfigError(
                f"{self.origin}: {len(ids)} tokens, and --tokens asks for {tokens}; "
                f"give a longer text or --tokens {len(ids)}"
            )
        start = random.Random(seed).randint(0, len(ids) - tokens)
        return torch.tensor([ids[start : start + tokens]])


def read_text(path: str | None) -> Text:
    """Read a file, or CPython's language reference for None; ConfigError if unread."""
    if path is None:
        return Text("language reference of Python", language_reference())
    try:
        return Text(Path(path).name, Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"--text {path}: cannot be read: {error}") from None
