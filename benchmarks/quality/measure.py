"""What is measured of one setting: fidelity to dense attention, density, seconds."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import fx

from benchmarks.quality import passkey
from benchmarks.quality.baselines import random_columns, window_for
from benchmarks.quality.table import Setting
from graphopt.agreement import agreement
from graphopt.search.density import visited_share
from graphopt.search.runner import Edit, GraphRunner, configured
from graphopt.search.sites import watch_ops

DENSE = "dense"
_SEED = 0


@dataclass(frozen=True)
class Side:
    """One configuration of the model: a label and the edit of its graph."""

    label: str
    edit: Edit


def sides(setting: Setting, density: float, tokens: int) -> Iterator[Side]:
    """Return the baselines of a setting that visited ``density`` of the pairs."""
    label = f"{setting.label} / random columns"
    yield Side(label, random_columns(density, _SEED))
    window = Setting(
        pattern="sliding-window", options={"window": window_for(density, tokens)}
    )
    yield Side(f"{setting.label} / window", configured(window.config()))


class Bench:
    """One model and text; every figure comes from the same runner.

    ``ids``: token ids [1, longest prompt + 1]; ``last``: positions at the end whose
    next-token distributions are compared.
    """

    def __init__(self, model: Any, tokenizer: Any, ids: torch.Tensor, last: int):
        self.model, self.tokenizer, self.ids = model, tokenizer, ids
        self.last = last
        self.runner = GraphRunner(model, keep=last)
        self.runner.add(DENSE, configured(""))
        self._dense: tuple[int, torch.Tensor] | None = None
        self._dense_seconds: dict[int, float] = {}
        self._shares: list[float] = []

    def fidelity(self, side: Side, tokens: int) -> dict[str, Any]:
        """Compare with dense attention on a prompt of ``tokens``."""
        dense = self.dense_logits(tokens)
        density, logits = self._watched(side, self.ids[:, :tokens])
        return {
            "density": round(density, 4),
            **{k: round(v, 5) for k, v in agreement(dense, logits).items()},
            "perplexity": round(self._perplexity(logits, tokens), 4),
            "dense_perplexity": round(self._perplexity(dense, tokens), 4),
        }

    def seconds(self, side: Side, tokens: int) -> dict[str, Any]:
        """Time the prefill, in CPU seconds of all threads, beside the dense one's.

        CPU seconds: an hour of rows meets other work, and these are shares of a plot,
        not the project's figures (`bench prefill` measures those).
        """
        self.runner.add(side.label, side.edit)
        # Rewriting is no part of the time.
        self.runner.prefill(side.label, self.ids[:, : self.last])
        own = self._cpu_seconds(side.label, tokens)
        if tokens not in self._dense_seconds:
            self._dense_seconds[tokens] = self._cpu_seconds(DENSE, tokens)
        dense = self._dense_seconds[tokens]
        return {
            "cpu_seconds": round(own, 3),
            "dense_cpu_seconds": round(dense, 3),
            "speedup": round(dense / own, 3),
        }

    def _cpu_seconds(self, name: str, tokens: int) -> float:
        start = time.process_time()
        self.runner.prefill(name, self.ids[:, :tokens])
        return time.process_time() - start

    def predict_seconds(self, passes: Mapping[int, int]) -> float:
        """Predict dense prefills, count by tokens, from one of 1024 tokens.

        Of its time a share of 0.2 grows with the square of the length (attention).
        """
        self.runner.prefill(DENSE, self.ids[:, :1024])  # captures the graph
        start = time.perf_counter()
        self.runner.prefill(DENSE, self.ids[:, :1024])
        unit = time.perf_counter() - start
        times = {t: unit * (0.8 * t / 1024 + 0.2 * (t / 1024) ** 2) for t in passes}
        return sum(count * times[t] for t, count in passes.items())

    def retrieval(self, side: Side, kind: str, tokens: int) -> float:
        """Return the share of ten needles found in prompts of ``tokens``."""
        self.runner.add(side.label, side.edit)
        prefill = partial(self.runner.prefill, side.label)
        text = self.ids[0].tolist()
        return passkey.accuracy(self.model, self.tokenizer, prefill, text, kind, tokens)

    def density(self, side: Side, tokens: int) -> float:
        """Return the share of the causal pairs that the side visits."""
        return self._watched(side, self.ids[:, :tokens])[0]

    def dense_logits(self, tokens: int) -> torch.Tensor:
        """Return dense attention's logits; those of the latest length are kept."""
        if self._dense is None or self._dense[0] != tokens:
            logits, _ = self.runner.prefill(DENSE, self.ids[:, :tokens])
            self._dense = (tokens, logits)
        return self._dense[1]

    def _watched(self, side: Side, ids: torch.Tensor) -> tuple[float, torch.Tensor]:
        """Return (density, logits); the mean over layers is that of pairs visited."""

        def edit(gm: fx.GraphModule) -> None:
            side.edit(gm)
            watch_ops(gm, lambda name, a: self._shares.append(visited_share(name, a)))

        self.runner.add(f"{side.label} (watched)", edit)
        self._shares.clear()
        logits, _ = self.runner.prefill(f"{side.label} (watched)", ids)
        layers = self.model.config.get_text_config().num_hidden_layers
        # Layers that a pass left alone, and rows that stayed dense, visit all pairs.
        rest = layers - len(self._shares)
        return (sum(self._shares) + rest) / layers, logits

    def _perplexity(self, logits: torch.Tensor, tokens: int) -> float:
        wanted = self.ids[0, tokens - self.last + 1 : tokens + 1]
        losses = torch.nn.functional.cross_entropy(logits.float(), wanted)
        return float(losses.exp())
