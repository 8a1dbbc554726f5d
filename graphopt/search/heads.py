"""Kernel-aware search: which pattern each head gets at equal measured cost.

The objective is that of MInference (Jiang et al. 2024, section 3.2): the distance of
the attention's output from dense attention's, on a real text, with the head's own
queries, keys and values. The dense prefill runs once; at each attention site its
tensors are looked at while they exist, so no more than one layer's are held beside the
model's own cache.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, fx

from graphopt.errors import ConfigError
from graphopt.ir.attention.site import AttentionSite
from graphopt.search.calibrate import Budget, calibrate
from graphopt.search.candidates import candidates
from graphopt.search.layer import LayerAttention
from graphopt.search.partial import Partial, Say
from graphopt.search.runner import Edit, GraphRunner
from graphopt.search.sites import causal_sites, scale_of, tap_site

SIZES = "sizes"


class _Seen(Exception):
    """Ends a prefill once the wanted layer was looked at."""


@dataclass
class HeadSearch:
    """A search over the heads of ``model`` on ``ids`` [1, tokens].

    ``partial`` holds what earlier runs found: the calibrated sizes and each finished
    layer. ``say`` is told of every step.
    """

    model: Any
    ids: Tensor
    budget: Budget
    partial: Partial
    say: Say = lambda what, done, of: None
    _runner: GraphRunner = field(init=False)

    def __post_init__(self) -> None:
        self._runner = GraphRunner(self.model)
        self._runner.add("score", self._edit(self._score))
        self._runner.add("calibrate", self._edit(self._calibrate))

    def run(self) -> tuple[dict[str, Any], list[dict[str, list[float]]]]:
        """Return (sizes by candidate, errors by candidate and head of every layer).

        Raises PassError for a model with attention that is not plain causal.
        """
        if SIZES not in self.partial.parts:
            self._stopping("calibrate")
        if self._missing():
            self._stopping("score")
        layers = [self.partial.parts[_layer(i)] for i in range(self._count())]
        return self.partial.parts[SIZES], layers

    def _count(self) -> int:
        return int(self.model.config.get_text_config().num_hidden_layers)

    def _missing(self) -> list[int]:
        done = self.partial.parts
        return [i for i in range(self._count()) if _layer(i) not in done]

    def _stopping(self, name: str) -> None:
        try:
            self._runner.prefill(name, self.ids)
        except _Seen:
            return

    def _edit(self, look: Callable[..., None]) -> Edit:
        def edit(gm: fx.GraphModule) -> None:
            sites = causal_sites(gm)
            if len(sites) != self._count():
                raise ConfigError(
                    f"the model has {self._count()} layers and {len(sites)} attention "
                    "sites; a heads table needs one a layer"
                )
            for site in sites:
                tap_site(gm, site, functools.partial(look, site))

        return edit

    def _calibrate(
        self, site: AttentionSite, index: int, q: Tensor, k: Tensor, v: Tensor
    ) -> None:
        """Find the sizes on the middle layer; they stand for all layers."""
        if index != self._count() // 2:
            return
        layer = _attention(site, q, k, v)
        budget, known, sizes = self.budget.seconds(layer), candidates(), {}
        for number, candidate in enumerate(known):
            self.say(f"calibrating {candidate.name}", number, len(known))
            sizes[candidate.name] = calibrate(layer, candidate, budget, q.shape[2])
        if not any("options" in found for found in sizes.values()):
            raise ConfigError(
                f"--budget {self.budget.text}: no candidate takes {budget:.4f} s a "
                f"layer at {q.shape[2]} tokens; raise the budget or the tokens"
            )
        self.partial.keep(SIZES, sizes)
        raise _Seen

    def _score(
        self, site: AttentionSite, index: int, q: Tensor, k: Tensor, v: Tensor
    ) -> None:
        missing = self._missing()
        if index in missing:
            self.say(f"layer {index}", index, self._count())
            layer, sizes = _attention(site, q, k, v), self.partial.parts[SIZES]
            dense = layer.dense()
            found = {
                name: layer.errors(dense, known["options"])
                for name, known in sizes.items()
                if "options" in known
            }
            self.partial.keep(_layer(index), found)
        if not self._missing():
            raise _Seen


def _layer(index: int) -> str:
    return f"layer {index}"


def _attention(site: AttentionSite, q: Tensor, k: Tensor, v: Tensor) -> LayerAttention:
    return LayerAttention(q, k, v, scale_of(site), site.softcap)
