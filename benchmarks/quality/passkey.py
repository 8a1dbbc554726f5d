"""Passkeys and RULER-style magic numbers, hidden in real text at ten depths.

The prompts are those that a 135M model answers when it attends densely: the question's
wording decides (a model asked for "the pass key hidden in the text above" says that it
is hidden there). The magic number's answer begins with the words that lead up to it, so
that the score is about finding, not about phrasing.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

DEPTHS = tuple(place / 100 for place in range(5, 100, 10))
_TEXT = "<<text>>"
_WORDS = ("amber", "harbour", "lantern", "meadow", "orchid", "pebble", "saffron")
_WRITTEN = 16  # tokens that an answer may take: numbers come in quotes or in bold

# (prompt ids [1, tokens]) -> (logits [keep, vocab], key-value cache)
Prefill = Callable[[torch.Tensor], tuple[torch.Tensor, Any]]


@dataclass(frozen=True)
class Needle:
    """A hidden sentence, the instructions before and the question after the text.

    ``begun``: the answer's first words, or none for an answer in the model's words.
    """

    kind: str
    before: str
    sentence: str
    question: str
    begun: str
    answer: str


def needle(kind: str, seed: int) -> Needle:
    """Return the ``seed``-th needle of ``kind``: passkey or magic-number."""
    draw = random.Random(f"{kind}-{seed}")
    if kind == "passkey":
        key = str(draw.randint(10_000, 99_999))
        return Needle(
            kind,
            "Read the text and remember the pass key.",
            f" The pass key is {key}. Remember it. {key} is the pass key. ",
            "What is the pass key? Reply with the number.",
            "",
            key,
        )
    word, key = draw.choice(_WORDS), str(draw.randint(1_000_000, 9_999_999))
    return Needle(
        kind,
        "Some special magic numbers are hidden within the following text. Memorise "
        "them.",
        f" One of the special magic numbers for {word} is: {key}. ",
        f"What is the special magic number for {word} mentioned in the provided text?",
        f"The special magic number for {word} mentioned in the provided text is",
        key,
    )


def prompt_ids(
    tokenizer: Any, text_ids: list[int], item: Needle, tokens: int, depth: float
) -> torch.Tensor:
    """Return a chat prompt of exactly ``tokens`` tokens, ids [1, tokens]."""
    content = f"{item.before}\n\n{_TEXT}\n\n{item.question}"
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=False,
    )
    parts = (rendered + item.begun).split(_TEXT)
    head, tail, found = (_ids(tokenizer, t) for t in (*parts, item.sentence))
    room = tokens - len(head) - len(found) - len(tail)
    if not 0 <= room <= len(text_ids):
        raise ValueError(f"{tokens} tokens: {room} are left for a text to hide in")
    place = round(depth * room)
    ids = head + text_ids[:place] + found + text_ids[place:room] + tail
    return torch.tensor([ids])


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)


@torch.no_grad()
def answered(
    model: Any, tokenizer: Any, prefill: Prefill, ids: torch.Tensor, item: Needle
) -> bool:
    """Tell whether the answer holds the number; decode is the model's own, dense."""
    logits, cache = prefill(ids)
    written = [int(logits[-1].argmax())]
    while len(written) < _WRITTEN:
        step = torch.tensor([written[-1:]])
        output = model(step, past_key_values=cache, use_cache=True)
        written.append(int(output.logits[0, -1].argmax()))
    return item.answer in tokenizer.decode(written)


def accuracy(
    model: Any,
    tokenizer: Any,
    prefill: Prefill,
    text_ids: list[int],
    kind: str,
    tokens: int,
) -> float:
    """Return the share of the ten depths at which the number is found."""
    right = 0
    for index, depth in enumerate(DEPTHS):
        item = needle(kind, index)
        ids = prompt_ids(tokenizer, text_ids, item, tokens, depth)
        right += answered(model, tokenizer, prefill, ids, item)
    return right / len(DEPTHS)
