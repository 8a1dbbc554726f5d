"""Bytes of CPython's language reference: a general part, and a task apart from it.

The task is the prose about strings, sequences and mappings with its sessions of the
interpreter; the general part is all other topics. Blocks of text are held out of both,
so that no model has read what it is judged by.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.texts import reference_topics

TASK = (
    "formatstrings", "string-methods", "typesseq", "typesseq-mutable", "typesmapping",
    "typesmethods", "sequence-types", "strings", "dict", "lists", "booleans",
)  # fmt: skip
VOCABULARY = 256
_BLOCK = 1024  # bytes that are held out, or not, together
_EVERY = 8  # of so many blocks one is for validation, one for the test


@dataclass(frozen=True)
class Text:
    """Token ids of one text: to train on, to choose by, and to judge by."""

    train: Tensor
    validation: Tensor
    test: Tensor


def texts() -> dict[str, Text]:
    """Return ``general`` and ``task``; each tensor is int64 [N]."""
    parts: dict[str, list[str]] = {"general": [], "task": []}
    for name, text in sorted(reference_topics().items()):
        parts["task" if name in TASK else "general"].append(text.strip())
    return {name: _split("\n\n".join(found)) for name, found in parts.items()}


def _split(text: str) -> Text:
    ids = torch.tensor(list(text.encode()), dtype=torch.long)
    blocks = ids[: len(ids) // _BLOCK * _BLOCK].view(-1, _BLOCK)
    turn = torch.arange(len(blocks)) % _EVERY
    kept = (turn != 3) & (turn != 7)
    return Text(blocks[kept].flatten(), blocks[turn == 3], blocks[turn == 7])


def batches(ids: Tensor, rows: int, length: int, seed: int) -> Tensor:
    """Return random pieces of ``ids``, int64 [rows, length]."""
    generator = torch.Generator().manual_seed(seed)
    starts = torch.randint(0, len(ids) - length, (rows,), generator=generator)
    return torch.stack([ids[s : s + length] for s in starts.tolist()])
