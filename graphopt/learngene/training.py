"""Train a student on a teacher's outputs, on labels, or on both; resumable."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.errors import ConfigError, ModelError
from graphopt.learngene.checkpoint import Checkpoint
from graphopt.learngene.evaluation import device_of, logits_of
from graphopt.learngene.examples import Examples
from graphopt.learngene.files import load_unique, unique_state
from graphopt.learngene.objective import distillation_loss
from graphopt.learngene.settings import TrainSettings

Say = Callable[[str, int, int], None]  # what is done, how many are, of how many


@dataclass
class Training:
    """Trains ``student`` in place; `run` goes on from the checkpoint at ``path``.

    ``teacher`` may be any module that returns logits of the student's classes; None
    where ``alpha`` is 0.
    """

    student: nn.Module
    examples: Examples
    settings: TrainSettings
    teacher: nn.Module | None = None
    path: Path | None = None
    say: Say = lambda what, done, of: None

    def __post_init__(self) -> None:
        given = self.settings
        if given.alpha > 0.0 and self.teacher is None:
            raise ConfigError("alpha above 0 needs a teacher; alpha = 0 takes labels")
        if len(self.examples) < given.batch:
            raise ConfigError(
                f"{len(self.examples)} examples make no batch of {given.batch}"
            )
        self._each = len(self.examples) // given.batch
        self.steps = given.epochs * self._each
        groups = _groups(self.student, given.decay)
        self._optimiser = torch.optim.AdamW(groups, eps=1e-8)
        for group in self._optimiser.param_groups:
            group["lr"] = given.rate
        self._schedule = torch.optim.lr_scheduler.LambdaLR(self._optimiser, self._rate)
        self._checkpoint = None
        if self.path is not None:
            self._checkpoint = Checkpoint(self.path, self._identity())

    def run(self, stop: int | None = None) -> list[float]:
        """Return the loss of each step; with ``stop`` so many steps at most are made.

        The checkpoint is removed at the end of the last step.
        """
        was_training = self.student.training
        self.student.train()
        with torch.random.fork_rng():
            torch.manual_seed(self.settings.seed)
            losses = self._resume()
            self._run(losses, self.steps if stop is None else min(stop, self.steps))
        self.student.train(was_training)
        if self._checkpoint is not None and len(losses) == self.steps:
            self._checkpoint.remove()
        return losses

    def _run(self, losses: list[float], end: int) -> None:
        for step in range(len(losses), end):
            text = f"loss {losses[-1]:.4f}" if losses else "training"
            self.say(text, step, self.steps)
            losses.append(self._step(step))
            if (step + 1) % self.settings.keep_every == 0 or step + 1 == end:
                self._keep(losses)

    def _step(self, step: int) -> float:
        batch = self._batch(step)
        loss = self._loss(batch)
        if not torch.isfinite(loss):
            raise ModelError(f"step {step}: the loss is {float(loss)}; lower the rate")
        self._optimiser.zero_grad(set_to_none=True)
        loss.backward()
        if self.settings.clip:
            parameters = self.student.parameters()
            torch.nn.utils.clip_grad_norm_(parameters, self.settings.clip)
        self._optimiser.step()
        self._schedule.step()
        return float(loss.detach())

    def _batch(self, step: int) -> Examples:
        epoch, place = divmod(step, self._each)
        order = self.examples.order(self.settings.seed, epoch)
        size = self.settings.batch
        index = order[place * size : (place + 1) * size]
        return self.examples.rows(index, device_of(self.student))

    def _loss(self, batch: Examples) -> Tensor:
        given = self.settings
        rows, labels = batch.scored(logits_of(self.student, batch))
        wanted = None
        if given.alpha > 0.0:
            assert self.teacher is not None
            with torch.no_grad():
                wanted, _ = batch.scored(logits_of(self.teacher, batch))
            if wanted.shape != rows.shape:
                raise ModelError(
                    f"the teacher gives {wanted.shape[-1]} classes, the student "
                    f"{rows.shape[-1]}"
                )
        if given.alpha < 1.0 and labels is None:
            raise ConfigError("alpha under 1 needs labels beside the examples")
        names = ("alpha", "temperature", "divide", "smoothing")
        options: dict[str, Any] = {name: getattr(given, name) for name in names}
        return distillation_loss(rows, wanted, labels, **options)

    def _rate(self, step: int) -> float:
        return self.settings.share(step, self.steps, self._each)

    def _identity(self) -> dict[str, Any]:
        known = {
            "examples": self.examples.digest,
            "student": _mark(self.student),
            "teacher": None if self.teacher is None else _mark(self.teacher),
        }
        return {**asdict(self.settings), **known}

    def _keep(self, losses: list[float]) -> None:
        if self._checkpoint is None:
            return
        state = {
            "student": _kept(self.student),
            "optimiser": self._optimiser.state_dict(),
            "schedule": self._schedule.state_dict(),
            "random": _random_state(),
            "losses": losses,
        }
        self._checkpoint.keep(state)

    def _resume(self) -> list[float]:
        state = None if self._checkpoint is None else self._checkpoint.read()
        if state is None:
            return []
        load_unique(self.student, state["student"], str(self.path))
        self._optimiser.load_state_dict(state["optimiser"])
        self._schedule.load_state_dict(state["schedule"])
        torch.set_rng_state(state["random"]["cpu"])
        if torch.cuda.is_available():
            torch.cuda.set_rng_state_all(state["random"]["cuda"])
        return list(state["losses"])


def distil(
    student: nn.Module,
    teacher: nn.Module,
    examples: Examples,
    settings: TrainSettings | None = None,
    *,
    path: Path | None = None,
    say: Say = lambda what, done, of: None,
) -> list[float]:
    """Train ``student`` on ``teacher``'s outputs, in place; return each step's loss."""
    given = settings or TrainSettings()
    return Training(student, examples, given, teacher.eval(), path, say).run()


def _kept(student: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in unique_state(student).items()}


def _mark(model: nn.Module) -> str:
    """Return what tells models, and other values of one, apart."""
    norm = partial(torch.linalg.vector_norm, dtype=torch.float64)
    # Six digits: the last ones go by the number of threads.
    norms = [f"{float(norm(p.detach())):.6e}" for p in model.parameters()]
    digest = hashlib.sha256(" ".join(norms).encode()).hexdigest()[:12]
    return f"{type(model).__name__} {digest}"


def _groups(model: nn.Module, decay: float) -> list[dict[str, Any]]:
    """Return AdamW's groups: matrices decay, vectors and single rows do not."""
    trained = [p for p in model.parameters() if p.requires_grad]
    matrices = [p for p in trained if p.dim() > 1 and len(p) > 1]
    known = {id(p) for p in matrices}
    others = [p for p in trained if id(p) not in known]
    return [
        {"params": matrices, "weight_decay": decay},
        {"params": others, "weight_decay": 0.0},
    ]


def _random_state() -> dict[str, Any]:
    cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return {"cpu": torch.get_rng_state(), "cuda": cuda}
