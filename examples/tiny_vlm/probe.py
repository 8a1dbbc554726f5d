"""What dropped vision tokens cost; ``python -m examples.tiny_vlm.probe``.

Behind a layer some of an image's tokens are hidden from all later layers, by their
attention mask: what dropping them computes, at full cost. ``random`` keeps any;
``attention`` keeps those that the last token attends to most there, the mean over
heads; ``asked`` keeps tokens of the cell asked about first: what a method could reach.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import LlavaForConditionalGeneration

from . import text
from .data import CELLS, Canvases, canvases
from .evaluate import accuracy
from .model import load

LEAD = len(text.ids("<s> user :"))
KEPT = (1.0, 1 / 2, 1 / 3, 2 / 9, 1 / 9, 0.0)
METHODS = ("random", "attention", "asked")


@contextmanager
def dropping(
    model: LlavaForConditionalGeneration,
    layer: int,
    keep: float,
    rank: Callable[[Tensor], Tensor],
) -> Iterator[None]:
    """Hide all but ``keep`` of the vision tokens behind ``layer`` while it lasts.

    ``model``: with eager attention, prompts without padding and with one image each.
    ``rank``: scores [N, 144] from the attention of that layer [N, H, S, S]; the
    ``ceil(144 keep)`` highest stay.
    """
    hidden: list[Tensor] = []
    end = LEAD + text.IMAGE_TOKENS

    def choose(_: Any, __: Any, output: tuple[Tensor, Tensor]) -> None:
        scores = rank(output[1])
        count = math.ceil(text.IMAGE_TOKENS * keep - 1e-9)
        dropped = torch.ones_like(scores, dtype=torch.bool)
        dropped.scatter_(1, scores.topk(count).indices, False)
        whole = dropped.new_zeros(len(scores), output[1].shape[-1])
        whole[:, LEAD:end] = dropped
        hidden[:] = [whole[:, None, None]]

    def hide(_: Any, args: Any, named: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        mask = named["attention_mask"]
        low = torch.finfo(mask.dtype).min
        return args, named | {"attention_mask": mask.masked_fill(hidden[0], low)}

    layers = model.model.language_model.layers
    hooks = [layers[layer].self_attn.register_forward_hook(choose)]
    for later in layers[layer + 1 :]:
        hooks.append(later.register_forward_pre_hook(hide, with_kwargs=True))
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def ranking(method: str, shown: Canvases, seed: int = 0) -> Callable[[Tensor], Tensor]:
    """Return how ``method`` scores the vision tokens of one batch ``shown``."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.rand((len(shown), text.IMAGE_TOKENS), generator=generator)
    if method == "attention":
        return lambda weights: weights[:, :, -1].mean(1)[:, LEAD:][:, : noise.shape[1]]
    if method == "asked":
        return lambda _: noise + _within(shown.asked)
    return lambda _: noise


def _within(asked: Tensor) -> Tensor:
    """Return [N, 144]: one where a patch lies in the cell asked about."""
    cells = torch.arange(CELLS**2).view(CELLS, CELLS)
    patches = cells.repeat_interleave(3, 0).repeat_interleave(3, 1).flatten()
    return (patches == asked[:, None]).float()


def cost(
    model: LlavaForConditionalGeneration,
    shown: Canvases,
    layer: int,
    keep: float,
    method: str,
    batch: int = 50,
) -> float:
    """Return the accuracy with ``keep`` of the vision tokens behind ``layer``."""
    right = 0.0
    for start in range(0, len(shown), batch):
        some = shown[start : start + batch]
        with dropping(model, layer, keep, ranking(method, some, start)):
            right += accuracy(model, some, batch) * len(some)
    return right / len(shown)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=300, help="canvases")
    parser.add_argument("--layers", type=int, nargs="+", default=[0, 1, 2, 4, 6, 8])
    options = parser.parse_args()
    model, shown = load(), canvases(options.count)
    model.set_attn_implementation("eager")
    print("method     behind " + "".join(f"{keep:8.0%}" for keep in KEPT))
    for method in METHODS:
        for layer in options.layers:
            row = (cost(model, shown, layer, keep, method) for keep in KEPT)
            figures = "".join(f"{share:8.3f}" for share in row)
            print(f"{method:10} {layer:6} {figures}", flush=True)


if __name__ == "__main__":
    main()
