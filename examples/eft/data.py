"""Bytes of what CPython says of itself: a general part, and a task apart from it.

The task is the language reference's prose about strings, sequences and mappings with
its sessions of the interpreter; the general part is the reference's other topics and
the docstrings of the standard library. Blocks of text are held out of both, so that no
model has read what it is judged by.
"""

from __future__ import annotations

import ast
import sysconfig
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from graphopt.texts import reference_topics

TASK = (
    "formatstrings", "string-methods", "typesseq", "typesseq-mutable", "typesmapping",
    "typesmethods", "sequence-types", "strings", "dict", "lists", "booleans",
)  # fmt: skip
_APART = ("site-packages", "test", "tests", "lib2to3", "idlelib", "pydoc_data")
_DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
_SHORTEST = 80  # characters of a docstring that says more than a name does
_SHORT = 40  # characters of a paragraph that may be said twice
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
    topics = sorted(reference_topics().items())
    task = [text for name, text in topics if name in TASK]
    general = [text for name, text in topics if name not in TASK]
    seen: set[str] = set()  # the task comes first: what it says is said nowhere else
    parts = {"task": task, "general": [*general, *_docstrings()]}
    return {name: _split(_once(found, seen)) for name, found in parts.items()}


def _once(parts: Iterable[str], seen: set[str]) -> str:
    """Return the paragraphs that are not in ``seen``, and put them there.

    Topics and docstrings quote one another; what is quoted would be trained on in one
    place and judged in another. How a paragraph is wrapped or indented does not matter.
    """
    kept = []
    for paragraph in (p for part in parts for p in part.strip("\n").split("\n\n")):
        key = " ".join(paragraph.split())
        if len(key) < _SHORT or key not in seen:
            kept.append(paragraph)
            seen.add(key)
    return "\n\n".join(kept)


def _docstrings() -> Iterator[str]:
    """Yield those of the standard library, in the order of its files."""
    root = Path(sysconfig.get_path("stdlib"))
    for file in sorted(root.rglob("*.py")):
        if set(_APART) & set(file.relative_to(root).parts):
            continue
        for node in ast.walk(ast.parse(file.read_bytes())):
            if isinstance(node, _DOCUMENTED):
                text = ast.get_docstring(node) or ""
                if len(text) >= _SHORTEST:
                    yield text


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
