"""How a student is trained: sizes, rates, and what counts."""

from __future__ import annotations

import math
from dataclasses import dataclass

from graphopt.errors import ConfigError
from graphopt.learngene.objective import Divide


@dataclass(frozen=True)
class TrainSettings:
    """How to train; the defaults are the paper's for the auxiliary model, but for size.

    ``alpha`` is the share of the teacher's distribution (1: no label is used), ``rate``
    the greatest learning rate of AdamW, reached after ``warmup`` epochs from
    ``warm_rate`` and left on a cosine for ``least_rate``. ``decay`` holds for matrices
    alone: not for vectors, nor for tensors with one row (class token, positions).
    A step takes ``batch`` examples; the rest of an epoch that makes no batch is left
    out. ``clip`` bounds the norm of the gradient (0: it does not). ``keep_every`` steps
    a checkpoint is written.
    """

    epochs: int = 1
    batch: int = 64
    rate: float = 5e-4
    warm_rate: float = 1e-6
    least_rate: float = 1e-5
    warmup: float = 0.0
    decay: float = 0.05
    alpha: float = 1.0
    temperature: float = 1.0
    divide: Divide = "elements"
    smoothing: float = 0.0
    clip: float = 0.0
    seed: int = 0
    keep_every: int = 200

    def __post_init__(self) -> None:
        if not 0.0 <= self.alpha <= 1.0 or self.temperature <= 0.0:
            raise ConfigError("alpha is between 0 and 1, the temperature above 0")
        if self.divide not in ("elements", "rows"):
            raise ConfigError(f"divide '{self.divide}': use elements or rows")
        if min(self.epochs, self.batch, self.keep_every) < 1:
            raise ConfigError("epochs, batch and keep_every are at least 1")

    def share(self, step: int, steps: int, epoch: int) -> float:
        """Return the share of ``rate`` at ``step`` of ``steps``, ``epoch`` an epoch."""
        warm = round(self.warmup * epoch)
        if step < warm:
            start = self.warm_rate / self.rate
            return start + (1.0 - start) * step / warm
        done = (step - warm) / max(steps - warm, 1)
        least = min(self.least_rate / self.rate, 1.0)
        return least + (1.0 - least) * 0.5 * (1.0 + math.cos(math.pi * done))
