"""Canvases of digits in a grid of cells, and a question about each."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .digits import SIDE, Digits, held_out
from .text import ANSWERS, NONE

CELLS = 4
"""Cells on a side of the canvas; 3 x 3 patches each."""

PATCH = 8
CELL = 3 * PATCH
CANVAS = CELLS * CELL
FILLED = (3, 7)
"""Fewest and most digits on a canvas of 16 cells."""

_ASK_FILLED = 0.8


@dataclass(frozen=True)
class Canvases:
    """Canvases with one question each.

    pixels: [N, 1, 96, 96] float32 in [-1, 1], background -1; cells: [N, 16] int64, a
    digit or ``text.NONE``, row by row; asked: [N] int64, the cell asked about.
    """

    pixels: Tensor
    cells: Tensor
    asked: Tensor

    def __len__(self) -> int:
        return len(self.asked)

    def __getitem__(self, rows: slice) -> Canvases:
        return Canvases(self.pixels[rows], self.cells[rows], self.asked[rows])

    @cached_property
    def classes(self) -> Tensor:
        """What is right: [N] int64, a digit or ``text.NONE``."""
        return self.cells.gather(1, self.asked[:, None])[:, 0]

    @cached_property
    def answers(self) -> Tensor:
        """The right answers' token ids: [N] int64."""
        return torch.tensor(ANSWERS)[self.classes]


def draw(
    digits: Digits,
    count: int,
    generator: np.random.Generator,
    filled: tuple[int, int] = FILLED,
) -> Canvases:
    """Draw ``count`` canvases of ``digits``, from ``filled[0]`` to ``filled[1]`` each.

    A digit lies anywhere within its cell. Four questions of five ask about a digit, the
    fifth about an empty cell.
    """
    many = generator.integers(filled[0], filled[1], count, endpoint=True)
    order = generator.random((count, CELLS**2)).argsort(1)
    inked = order < many[:, None]
    chosen = generator.integers(0, len(digits), (count, CELLS**2))
    cells = np.where(inked, digits.labels[chosen], NONE).astype(np.int64)
    canvas = np.zeros((count, CANVAS, CANVAS), np.uint8)
    shifts = generator.integers(0, CELL - SIDE, (count, CELLS**2, 2), endpoint=True)
    for n, cell in zip(*np.nonzero(inked), strict=True):
        y, x = np.array(divmod(cell, CELLS)) * CELL + shifts[n, cell]
        canvas[n, y : y + SIDE, x : x + SIDE] = digits.images[chosen[n, cell]]
    full = generator.random(count) < _ASK_FILLED
    wanted = generator.random((count, CELLS**2)) + (inked == full[:, None])
    pixels = torch.from_numpy(canvas).unsqueeze(1).float() / 127.5 - 1
    asked = torch.from_numpy(wanted.argmax(1))
    return Canvases(pixels, torch.from_numpy(cells), asked)


def canvases(
    count: int, seed: int = 0, split: Literal["validation", "test"] = "test"
) -> Canvases:
    """Return held-out canvases: the same ones for the same ``seed`` and ``split``.

    Tune on ``validation``, report ``test``: no digit is in both, or in the training.
    """
    stream = {"validation": 1, "test": 2}[split]
    return draw(held_out(split), count, np.random.default_rng([stream, seed]))
