"""What is trained, on one set of digits and from one seed."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import ViTConfig, ViTForImageClassification

from examples.sws.data import Data
from graphopt import learngene
from graphopt.learngene import Training, TrainSettings


@dataclass(frozen=True)
class Plan:
    """Depths, stages and epochs; the widths are the same everywhere.

    ``tuned`` are epochs after expansion; ``scratch`` those from random values: the same
    ones, and larger budgets. Each is a training of its own with its own schedule.
    """

    teacher_depth: int = 6
    teacher_epochs: int = 30
    stages: tuple[int, ...] = (2, 2, 2, 2)
    auxiliary_epochs: int = 30
    depths: tuple[int, ...] = (4, 6, 10)
    tuned: tuple[int, ...] = (1, 5)
    scratch: tuple[int, ...] = (1, 5, 30)
    hidden: int = 48
    batch: int = 64
    rate: float = 1e-3
    tuned_rate: float = 5e-4
    divide: Any = "elements"


PLANS = {
    "digits": Plan(),
    "mnist": Plan(
        teacher_epochs=4, auxiliary_epochs=4, tuned=(1,), scratch=(1, 4), batch=128
    ),
}


@dataclass(frozen=True)
class Trained:
    """One training: ``kind`` of model, its depth, and what was seen."""

    kind: str
    depth: int
    epochs: int
    accuracy: float
    seconds: float
    parameters: int


class Family:
    """Trains the teacher, the auxiliary model and all depths from ``seed``."""

    def __init__(self, data: Data, plan: Plan, seed: int, device: str = "cpu") -> None:
        self.data, self.plan, self.seed, self.device = data, plan, seed, device

    def run(self) -> Iterator[Trained]:
        """Yield each training when it is done."""
        plan = self.plan
        teacher = self.new(plan.teacher_depth)
        yield self.train("teacher", teacher, plan.teacher_epochs)
        auxiliary = learngene.build(
            teacher, plan.stages, init="random", seed=self.seed + 1
        )
        yield self.train("auxiliary", auxiliary, plan.auxiliary_epochs, teacher)
        for depth in plan.depths:
            for epochs in plan.tuned:
                made = learngene.expand(auxiliary, depth=depth)
                yield self.train("descendant", made, epochs)
            for epochs in plan.scratch:
                yield self.train("scratch", self.new(depth), epochs)

    def new(self, depth: int) -> nn.Module:
        """Return a random model of ``depth`` layers."""
        torch.manual_seed(self.seed)
        config = ViTConfig(
            hidden_size=self.plan.hidden,
            intermediate_size=2 * self.plan.hidden,
            num_hidden_layers=depth,
            num_attention_heads=4,
            image_size=self.data.side,
            patch_size=self.data.patch,
            num_channels=1,
            num_labels=10,
        )
        return ViTForImageClassification(config).to(self.device)

    def train(
        self, kind: str, model: nn.Module, epochs: int, teacher: nn.Module | None = None
    ) -> Trained:
        """Train ``model``: on the teacher's outputs alone, or on labels alone.

        Seconds are processor time of this process, which other work does not lengthen;
        on a GPU they are those of the clock.
        """
        plan = self.plan
        settings = TrainSettings(
            epochs=epochs,
            batch=plan.batch,
            rate=plan.tuned_rate if kind == "descendant" else plan.rate,
            warmup=0.0 if kind == "descendant" else min(2.0, epochs / 5),
            alpha=0.0 if teacher is None else 1.0,
            divide=plan.divide,
            seed=self.seed,
        )
        clock = time.process_time if self.device == "cpu" else time.perf_counter
        start = clock()
        Training(model, self.data.train, settings, teacher).run()
        seconds = clock() - start
        accuracy = learngene.evaluate(model, self.data.test)["accuracy"]
        depth = len(learngene.find_stack(model))
        stored = learngene.stored_parameters(model)
        return Trained(kind, depth, epochs, accuracy, seconds, stored)
