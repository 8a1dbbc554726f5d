"""Find TEAL's levels: which inputs of a layer can be left out at the least harm."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from graphopt.calibration.levels import Levels
from graphopt.calibration.record import Calibration
from graphopt.errors import PassError
from graphopt.ir.constants import parameter_name
from graphopt.ir.match import value_of
from graphopt.ir.model_graph import ModelGraph
from graphopt.ir.sites.linear import LinearSite, operands
from graphopt.ir.stream.layers import Layer
from graphopt.ops.sparse_linear import kept

Say = Callable[[str, int, int], None]
_MOST = 0.95  # of a linear's inputs
_JUDGED = 0.25  # of a text's tokens, the last ones


def find_levels(
    model: nn.Module,
    ids: Tensor,
    calibration: Calibration,
    sparsity: float,
    *,
    step: float = 0.025,
    say: Say = lambda *_: None,
) -> Levels:
    """Return levels that leave out ``sparsity`` of each layer's weights.

    Greedy: the layer gives up ``step`` of its weights at a time, each time those of the
    input whose loss changes its output the least (L2, over the last quarter of the
    tokens of ``ids`` [texts, tokens], other layers dense). Linears of one input have
    one level. Raises PassError where no layer is found.
    """
    found = Levels(sparsity)

    def backend(gm: fx.GraphModule, _: Sequence[Any]) -> Callable[..., Any]:
        search = _Search(gm, calibration, found, step, say)
        return lambda *arguments: search.run(*arguments)

    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend, dynamic=True)(
            input_ids=ids, use_cache=False
        )
    if not found.table:
        raise PassError("levels: no layer with linears over parameters was found")
    return found


@dataclass(frozen=True)
class _Group:
    """Linears of one input; ``share`` of the layer's weights."""

    linears: tuple[LinearSite, ...]
    share: float


class _Search(fx.Interpreter):
    """Runs a graph, and each layer again and again when it comes to it."""

    def __init__(
        self,
        gm: fx.GraphModule,
        calibration: Calibration,
        found: Levels,
        step: float,
        say: Say,
    ) -> None:
        super().__init__(gm)
        self._calibration, self._levels = calibration, found
        self._step, self._say = step, say
        self._limits: dict[fx.Node, float] = {}
        nodes = list(gm.graph.nodes)
        order = {node: index for index, node in enumerate(nodes)}
        layers = [x for x in ModelGraph(gm).layers if x.linears]
        self._parts = {
            x.index: nodes[order[x.input] + 1 : order[x.output] + 1] for x in layers
        }
        self._layers = {self._parts[x.index][0]: x for x in layers}

    def run_node(self, n: fx.Node) -> Any:
        """Run a node; at the first one of a layer, find the layer's levels."""
        if n in self._layers:
            self._search(self._layers.pop(n))
        limit = self._limits.get(n)
        if limit is None:
            return super().run_node(n)
        source: fx.Node = operands(n)[0]
        whole = self.env[source]
        self.env[source] = whole.where(kept(whole, torch.tensor(limit)), 0)
        result = super().run_node(n)
        self.env[source] = whole
        return result

    def _search(self, layer: Layer) -> None:
        self._say("layers", layer.index, layer.index + 1 + len(self._layers))
        groups, left = _groups(layer), self._levels.sparsity
        levels = [0.0] * len(groups)
        dense = self._output(layer, groups, levels)
        while left > 1e-9:
            amount = min(self._step, left)
            left -= amount
            moves = _moves(groups, levels, amount)
            if not moves:
                break
            errors = [self._error(layer, groups, move, dense) for move in moves]
            levels = moves[errors.index(min(errors))]
        for group, level in zip(groups, levels, strict=True):
            names = [parameter_name(site.weight) for site in group.linears]
            self._levels.table |= dict.fromkeys(names, level)

    def _error(
        self, layer: Layer, groups: list[_Group], levels: list[float], dense: Tensor
    ) -> float:
        return float((self._output(layer, groups, levels) - dense).norm())

    def _output(
        self, layer: Layer, groups: list[_Group], levels: list[float]
    ) -> Tensor:
        """Return the layer's output for its last tokens, and leave no trace."""
        for group, level in zip(groups, levels, strict=True):
            if level:
                limits = {s.node: self._limit(s, level) for s in group.linears}
                self._limits |= limits
        before, part = self.env, self._parts[layer.index]
        self.env = dict(before)
        for node in part:
            self.env[node] = self.run_node(node)
        result: Tensor = self.env[part[-1]]
        self.env, self._limits = before, {}
        judged = max(1, round(_JUDGED * result.shape[1]))
        return result[:, -judged:].float()

    def _limit(self, site: LinearSite, level: float) -> float:
        name = parameter_name(site.weight)
        return self._calibration.threshold("input", name, level)


def _groups(layer: Layer) -> list[_Group]:
    by_input: dict[fx.Node, list[LinearSite]] = {}
    for site in layer.linears:
        if parameter_name(site.weight) and not site.unsupported():
            by_input.setdefault(site.input, []).append(site)
    sizes = [sum(value_of(s.weight).numel() for s in g) for g in by_input.values()]
    return [
        _Group(tuple(group), size / sum(sizes))
        for group, size in zip(by_input.values(), sizes, strict=True)
    ]


def _moves(
    groups: list[_Group], levels: list[float], amount: float
) -> list[list[float]]:
    """Return what the levels may be after ``amount`` more of the layer is given up."""
    found = []
    for index, group in enumerate(groups):
        level = levels[index] + amount / group.share
        if level <= _MOST:
            found.append([*levels[:index], level, *levels[index + 1 :]])
    return found
