"""Several questions about one canvas in one sequence, each blind to the others.

The image and the words before a question are computed once. A mask lets a question see
them and itself, and every question has the positions that it would have alone, so the
model is trained on exactly the prompts that `text.prompt` writes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from . import text
from .data import CELLS
from .text import Phrasing


@dataclass(frozen=True)
class Layout:
    """What is the same for all canvases of a batch, P shared tokens and S in all.

    prefix: [P] token ids; positions: [1, S]; mask: [1, 1, S, S] bool, true where a
    query (row) sees a key; branch: tokens of a question with its answer.
    """

    prefix: Tensor
    positions: Tensor
    mask: Tensor
    branch: int


def layout(questions: int, phrasing: Phrasing, coarse: bool = False) -> Layout:
    """Return the layout of ``questions`` questions behind one image.

    ``coarse``: the image is 16 tokens, one for each cell, at the position of the cell's
    middle patch.
    """
    whole = text.ids(text.prompt(text.question(0, phrasing)))
    branch = len(_branch(0, 0))
    shared = len(whole) + 1 - branch
    size = shared + questions * branch
    own = torch.full((size,), -1)
    own[shared:] = torch.arange(questions).repeat_interleave(branch)
    causal = torch.ones(size, size, dtype=torch.bool).tril()
    mask = causal & ((own[:, None] == own) | (own == -1))
    within = torch.arange(branch).repeat(questions) + shared
    positions = torch.cat([torch.arange(shared), within])
    prefix = torch.tensor(whole[:shared])
    stay = torch.ones(size, dtype=torch.bool)
    if coarse:
        stay[:shared] = (prefix != text.IMAGE) | _middles(prefix)
    return Layout(
        prefix[stay[:shared]],
        positions[None, stay],
        mask[None, None, stay][..., stay],
        branch,
    )


def branches(cells: Tensor, asked: Tensor) -> Tensor:
    """Return the questions and their answers: [N, Q * branch] token ids.

    cells: [N, 16], the classes of each canvas; asked: [N, Q], cells asked about.
    """
    table = torch.tensor(
        [[_branch(cell, c) for c in range(len(text.ANSWERS))] for cell in _cells()]
    )
    return table[asked, cells.gather(1, asked)].flatten(1)


def _middles(prefix: Tensor) -> Tensor:
    """Return which tokens of ``prefix`` are a cell's middle patch: [P] bool."""
    third = torch.arange(3 * CELLS) % 3 == 1
    middle = torch.zeros_like(prefix, dtype=torch.bool)
    middle[prefix == text.IMAGE] = (third[:, None] & third).flatten()
    return middle


def _cells() -> range:
    return range(CELLS**2)


def _branch(cell: int, answer: int) -> list[int]:
    """Return what differs from question to question, from "cell" to the answer."""
    asked = text.question(cell, "short")
    return [*text.ids(f"{asked} assistant :"), text.ANSWERS[answer]]
