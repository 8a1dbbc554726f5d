"""How often the model answers right; ``python -m examples.tiny_vlm.evaluate``."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from . import text
from .data import Canvases, canvases
from .model import load
from .text import Phrasing


def inputs(
    shown: Canvases, phrasing: Phrasing | None = "long", padding: int = 0
) -> dict[str, Tensor]:
    """Return the model's inputs: input_ids and attention_mask [N, S], pixel_values.

    ``phrasing``: of the questions; None asks each second one shortly, so that prompts
    differ in length and the shorter ones are padded. Padding is on the left,
    ``padding`` more of it than needed.
    """
    ways: tuple[Phrasing, ...] = (phrasing,) if phrasing else ("long", "short")
    prompts = []
    for n, cell in enumerate(shown.asked.tolist()):
        asked = text.question(cell, ways[n % len(ways)])
        prompts.append(text.ids(text.prompt(asked)))
    length = max(map(len, prompts)) + padding
    fill = [length - len(tokens) for tokens in prompts]
    pairs = list(zip(fill, prompts, strict=True))
    tokens = [[text.PAD] * empty + some for empty, some in pairs]
    mask = [[0] * empty + [1] * len(some) for empty, some in pairs]
    return {
        "input_ids": torch.tensor(tokens),
        "attention_mask": torch.tensor(mask),
        "pixel_values": shown.pixels,
    }


@torch.no_grad()
def predictions(
    model: Callable[..., Any],
    shown: Canvases,
    batch: int,
    phrasing: Phrasing | None = "long",
    padding: int = 0,
) -> Tensor:
    """Return the greedy first token of each answer: [N] int64 token ids.

    ``model``: the model or what `torch.compile` made of it. A forward pass takes
    ``batch`` canvases, computes the last position's logits only and keeps no cache;
    the last batch may be smaller.
    """
    found = []
    for start in range(0, len(shown), batch):
        some = inputs(shown[start : start + batch], phrasing, padding)
        logits = model(**some, use_cache=False, logits_to_keep=1).logits
        found.append(logits[:, -1].argmax(-1))
    return torch.cat(found)


def accuracy(
    model: Callable[..., Any],
    shown: Canvases,
    batch: int,
    phrasing: Phrasing | None = "long",
    padding: int = 0,
) -> float:
    """Return the share of right answers in [0, 1]; see `predictions`."""
    found = predictions(model, shown, batch, phrasing, padding)
    return (found == shown.answers).float().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000, help="canvases")
    parser.add_argument("--batch", type=int, default=50)
    options = parser.parse_args()
    model, shown = load(), canvases(options.count)
    digit = shown.classes != text.NONE
    ways: list[tuple[str, Phrasing | None]] = [
        ("long questions", "long"),
        ("short questions", "short"),
        ("mixed, padded", None),
    ]
    for name, phrasing in ways:
        right = predictions(model, shown, options.batch, phrasing) == shown.answers
        of = [right, right[digit], right[~digit]]
        whole, filled, empty = (part.float().mean().item() for part in of)
        print(f"{name}: {whole:.3f} right; of digits {filled:.3f}, of none {empty:.3f}")


if __name__ == "__main__":
    main()
