"""Attention of one layer on its real tensors, under any options of the pass.

The site is a graph of one operator which the pass rewrites, so a candidate runs the
very kernels and sizes that a config with its options gives.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode

from graphopt import ops as _ops  # noqa: F401  registers graphopt::attention
from graphopt.backend import rewrite
from graphopt.options import parse_options


class LayerAttention:
    """query [1, Hq, S, D], key and value [1, Hkv, S, D] of a causal prefill."""

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        scale: float | None = None,
        softcap: float = 0.0,
    ) -> None:
        self._tensors = (query, key, value)
        self._tail = (0, scale, softcap, 0)

    def dense(self) -> Tensor:
        """Return causal attention [1, Hq, S, D]."""
        arguments = (*self._tensors, None, "causal", [0], [0], *self._tail)
        return torch.ops.graphopt.attention(*arguments)

    def sparse(self, options: Mapping[str, Any]) -> Tensor:
        """Return attention as ``sparse-attention`` with ``options`` computes it."""
        return self._module(options)(*self._tensors)[0]

    def dense_seconds(self) -> float:
        """Time dense attention."""
        return _best(self.dense)

    def seconds(self, options: Mapping[str, Any]) -> float:
        """Time selection and attention under ``options``, all heads alike."""
        module = self._module(options)
        return _best(lambda: module(*self._tensors))

    def errors(self, dense: Tensor, options: Mapping[str, Any]) -> list[float]:
        """Return each head's error against ``dense``: relative L2 over all rows."""
        wrong = (self.sparse(options) - dense)[0].double().flatten(1).norm(dim=1)
        return (wrong / dense[0].double().flatten(1).norm(dim=1)).tolist()

    def _module(self, options: Mapping[str, Any]) -> fx.GraphModule:
        entry = {"name": "sparse-attention", "force": True, **options}
        config = {"defaults": False, "pass": [entry]}
        gm = self._graph()
        rewrite(gm, parse_options({"config": config, "strict": True}))
        return gm

    def _graph(self) -> fx.GraphModule:
        """Return the site as a captured graph would hold it."""
        mode, graph = FakeTensorMode(), fx.Graph()
        inputs = []
        for name, tensor in zip(("q", "k", "v"), self._tensors, strict=True):
            node = graph.placeholder(name)
            node.meta["example_value"] = mode.from_tensor(tensor)
            inputs.append(node)
        arguments = (*inputs, None, "causal", [0], [0], *self._tail)
        site = graph.call_function(torch.ops.graphopt.attention.default, arguments)
        site.meta["example_value"] = torch.empty_like(inputs[0].meta["example_value"])
        graph.output((site,))
        return fx.GraphModule(torch.nn.Module(), graph)


def _best(function: Any, runs: int = 2) -> float:
    function()
    times = []
    for _ in range(runs):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)
