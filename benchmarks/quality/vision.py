"""Answers of a vision-language model under drops of vision tokens, without Inductor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from examples.tiny_vlm.data import Canvases
from examples.tiny_vlm.evaluate import accuracy, inputs
from examples.tiny_vlm.text import IMAGE_TOKENS
from graphopt.cli.layer_cost import ENDS, SizesAt, layer_costs
from graphopt.ir.match import op_name
from graphopt.ir.vision.span import LanguageGraph
from graphopt.search.runner import Edit, GraphRunner, configured

_CHOICES = ("graphopt.keep_tokens", "graphopt.keep_passing")
_RANKS = "graphopt.vision_ranks"


@dataclass(frozen=True)
class Answers:
    """``accuracy`` in [0, 1]; ``kept``: vision tokens of a prompt behind the last drop,
    the mean; ``ranks`` [N, S] by which tokens went there, None where the batches' sizes
    differ."""

    accuracy: float
    kept: float
    ranks: Tensor | None


class Watched:
    """An edit of a graph after which the last result of some operators is known."""

    def __init__(self, edit: Edit, *names: str) -> None:
        self._edit, self._names = edit, names
        self.last: dict[str, Tensor] = {}

    def edit(self, gm: fx.GraphModule) -> None:
        """Make the edit and watch the operators."""
        self._edit(gm)
        for node in gm.graph.nodes:
            if (name := op_name(node)) in self._names:
                node.target = self._watched(name, node.target)

    def _watched(self, name: str, target: Any) -> Callable[..., Tensor]:
        def call(*arguments: Any) -> Tensor:
            self.last[name] = result = target(*arguments)
            return result

        return call


class Asked:
    """Asks the tiny model of `examples.tiny_vlm` under one config after another."""

    def __init__(self, model: Any, shown: Canvases) -> None:
        warm(model, inputs(shown[:1]))
        self.runner = GraphRunner(model, use_cache=False)

    def answers(self, config: str, shown: Canvases, batch: int) -> Answers:
        """Ask about every canvas; by thresholds ``batch`` 1 keeps rows apart."""
        watched = Watched(configured(config), *_CHOICES, _RANKS)
        self.runner.add(config, watched.edit)
        kept: list[int] = []
        ranks: list[Tensor] = []

        def model(**given: Any) -> Any:
            watched.last = {}
            output = self.runner.call(config, **given)
            rows, tokens = given["input_ids"].shape
            alive = next((watched.last[n] for n in _CHOICES if n in watched.last), None)
            left = tokens if alive is None else alive.shape[1]
            kept.extend([left - tokens + IMAGE_TOKENS] * rows)
            if _RANKS in watched.last:
                ranks.append(watched.last[_RANKS])
            return output

        right = accuracy(model, shown, batch)
        whole = len({r.shape[1] for r in ranks}) == 1
        return Answers(
            right, sum(kept) / len(kept), torch.cat(ranks) if whole else None
        )


def warm(model: Any, given: dict[str, Tensor]) -> None:
    """Let transformers install its hooks, which would break a graph."""
    with torch.no_grad():
        model(**given, use_cache=False, logits_to_keep=1)


@dataclass(frozen=True)
class Flops:
    """1e9 FLOPs of a prefill, the encoder among them, and of its layers alone."""

    whole: float
    layers: float


def predicted(runner: GraphRunner, config: str, given: dict[str, Tensor]) -> Flops:
    """Return what `graphopt explain`'s cost model says of a prefill, batch 1.

    What scores and chooses tokens is not counted.
    """
    found = []

    def edit(gm: fx.GraphModule) -> None:
        at = SizesAt(LanguageGraph(gm), given["input_ids"].shape[1])
        configured(config)(gm)
        rows = layer_costs(LanguageGraph(gm), at)
        whole, ends = (
            sum(r["gflop"] for r in rows if r["layer"] == ENDS or not only)
            for only in (False, True)
        )
        found.append(Flops(whole, whole - ends))

    name = f"{config} (cost)"
    runner.add(name, edit)
    runner.call(name, **given, use_cache=False, logits_to_keep=1)
    return found[0]


def bound_for(ranks: Tensor, kept: float) -> float:
    """Return the score from which tokens stay so that rows keep ``kept`` on average.

    ranks [N, S] as `graphopt::vision_ranks` gives them: protected vision tokens, which
    stay anyway, have the greatest finite one, scores are at most a quarter of it.
    """
    top = torch.finfo(ranks.dtype).max
    scores = ranks[ranks <= top / 4].sort(descending=True).values
    number = round(kept * len(ranks)) - int((ranks == top).sum())
    if not 0 < number <= len(scores):
        raise ValueError(f"no bound leaves {kept} vision tokens of a row on average")
    return float(scores[number - 1])
