"""A tokenizer of single characters, for models of a hundred tokens."""

from __future__ import annotations

import random


class Letters:
    """Ids 3 to 98 are the printable characters from the blank on."""

    def __call__(self, text, **options):
        ids = [3 + (ord(c) - 32) % 96 for c in text]
        return type("Encoded", (), {"input_ids": ids})

    def decode(self, ids):
        return "".join(chr(int(i) - 3 + 32) for i in ids)


def prose(length: int, seed: int = 0) -> str:
    """Return random characters: no two places alike."""
    draw = random.Random(seed)
    return "".join(chr(draw.randint(32, 120)) for _ in range(length))
