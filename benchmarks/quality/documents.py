"""Questions about a fact that one of several documents states.

Documents are topics of CPython's language reference; one of them says, in the middle of
its text, what an invented place's password is. The prompt ends just before the
password, so that one prediction tells whether the model found it: SmolLM2 has a token
for each password. Dense, it answers nearly all such questions of 2,048 tokens.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch

from graphopt.texts import reference_topics

_PLACES = (
    "Kelmar", "Vostrand", "Ardenne", "Tolvik", "Brennock", "Ossaria", "Quillmere",
    "Draxton", "Feldmoor", "Jorvale", "Merrow", "Norhaven",
)  # fmt: skip
_PASSWORDS = (
    "orange", "anchor", "winter", "bridge", "forest", "summer", "purple", "castle",
    "river", "ocean", "planet", "window", "market", "doctor", "camera", "engine",
)  # fmt: skip
_DOCUMENT = 512  # tokens of a document, about
_TEXT = "<<documents>>"
_ASKED = "Read the documents and answer the question."


@dataclass(frozen=True)
class Question:
    """A prompt, token ids [1, tokens], and the token that answers it."""

    ids: torch.Tensor
    answer: int


def question(tokenizer: Any, tokens: int, seed: int) -> Question:
    """Return the ``seed``-th question in a chat prompt of exactly ``tokens`` tokens."""
    draw = random.Random(f"documents-{tokens}-{seed}")
    place, password = draw.choice(_PLACES), draw.choice(_PASSWORDS)
    fact = f' The password of {place} is "{password}". Remember it: the password of '
    fact += f'{place} is "{password}". '
    head, tail = _ends(tokenizer, place)
    texts = _texts(tokenizer, draw, tokens - len(head) - len(tail), fact)
    ids = [*head, *texts, *tail]
    return Question(torch.tensor([ids]), _ids(tokenizer, password)[0])


def _ends(tokenizer: Any, place: str) -> tuple[list[int], list[int]]:
    """Return what stands before and after the documents."""
    content = f"{_ASKED}\n\n{_TEXT}\n\nWhat is the password of {place}?"
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=False,
    )
    parts = (rendered + f'The password of {place} is "').split(_TEXT)
    head, tail = (_ids(tokenizer, part) for part in parts)
    return head, tail


def _texts(tokenizer: Any, draw: random.Random, room: int, fact: str) -> list[int]:
    """Return documents of ``room`` tokens in all; one of them states the fact."""
    count = max(2, round(room / _DOCUMENT))
    sizes = [room * (i + 1) // count - room * i // count for i in range(count)]
    asked, stated = draw.randrange(count), _ids(tokenizer, fact)
    found: list[int] = []
    for number, (text, size) in enumerate(
        zip(_topics(draw, count), sizes, strict=True)
    ):
        title = _ids(tokenizer, f"\n\nDocument {number + 1}\n\n")
        own = stated if number == asked else []
        left = size - len(title) - len(own)
        if left < 2:
            raise ValueError(f"{size} tokens are too few for a document with a fact")
        words = _ids(tokenizer, text)[:left]
        middle = draw.randint(left // 4, 3 * left // 4)
        found += [*title, *words[:middle], *own, *words[middle:]]
    return found


def _topics(draw: random.Random, count: int) -> list[str]:
    """Return topics long enough for a document each, other ones for each question."""
    long = [t.strip() for t in reference_topics().values() if len(t) > 8 * _DOCUMENT]
    return draw.sample(long, count)


def _ids(tokenizer: Any, text: str) -> list[int]:
    return list(tokenizer(text, add_special_tokens=False).input_ids)
