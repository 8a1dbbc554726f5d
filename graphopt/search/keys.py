"""Samples that only far tokens answer: passkeys in real text, asked for at the end.

After DuoAttention's training data (Xiao et al. 2024, section 2.2): several keys at
random depths, all of them to be repeated, in the words in which they stood.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch

from graphopt.errors import ConfigError

_NAMES = (
    "amber", "harbour", "lantern", "meadow", "orchid", "pebble", "saffron", "willow",
    "copper", "violet",
)  # fmt: skip
_BEFORE = "Read the text and remember the pass keys.\n\n"
_QUESTION = "\n\nWhat are the pass keys?"


@dataclass(frozen=True)
class Samples:
    """Samples of ``context`` tokens out of ``text_ids``.

    ``keys``: passkeys a sample. ``near``: tokens before the answer among which none is
    hidden: streaming heads see those.
    """

    tokenizer: Any
    text_ids: list[int]
    context: int
    keys: int
    near: int

    def draw(self, seed: str) -> tuple[torch.Tensor, int]:
        """Return (ids [1, context], how many at the end are the answer).

        Raises ConfigError where the context or the text is too short.
        """
        draw = random.Random(seed)
        names = draw.sample(_NAMES, self.keys)
        said = [
            f" The pass key of {n} is {draw.randint(10_000, 99_999)}." for n in names
        ]
        before, after = self._around()
        answer = self._ids("".join(said).strip())
        hidden = [self._ids(sentence) for sentence in said]
        fixed = len(before) + len(after) + len(answer) + sum(map(len, hidden))
        room = self.context - fixed
        far = room - self.near
        if far < self.context // 8:
            raise ConfigError(
                f"--context {self.context}: {max(far, 0)} tokens are left in which to "
                f"hide keys out of sight of the {self.near} nearest; give a longer one"
            )
        text = self._excerpt(room, draw)
        places = sorted(draw.randint(0, far) for _ in names)
        for place, ids in reversed(list(zip(places, hidden, strict=True))):
            text[place:place] = ids
        return torch.tensor([before + text + after + answer]), len(answer)

    def _excerpt(self, tokens: int, draw: random.Random) -> list[int]:
        spare = len(self.text_ids) - tokens
        if spare < 0:
            raise ConfigError(
                f"the text has {len(self.text_ids)} tokens, a sample of --context "
                f"{self.context} needs {tokens}; give a longer text"
            )
        start = draw.randint(0, spare)
        return self.text_ids[start : start + tokens]

    def _around(self) -> tuple[list[int], list[int]]:
        """Return what stands before and after the text, as the model chats."""
        marker = "<<text>>"
        content = f"{_BEFORE}{marker}{_QUESTION}"
        if getattr(self.tokenizer, "chat_template", None):
            message = [{"role": "user", "content": content}]
            content = self.tokenizer.apply_chat_template(
                message, add_generation_prompt=True, tokenize=False
            )
        before, _, after = content.partition(marker)
        return self._ids(before), self._ids(after)

    def _ids(self, text: str) -> list[int]:
        return list(self.tokenizer(text, add_special_tokens=False).input_ids)
