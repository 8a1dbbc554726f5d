"""Run a model over texts and keep statistics of what its linears are given."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import fx, nn

from graphopt.calibration.record import Calibration
from graphopt.calibration.statistics import InputStatistics, Magnitudes
from graphopt.errors import PassError
from graphopt.ir.constants import parameter_name
from graphopt.ir.match import argument, op_name
from graphopt.ir.model_graph import ModelGraph
from graphopt.ir.sites.ffn import FfnSite
from graphopt.search.runner import GraphRunner

See = Callable[[torch.Tensor], None]
Say = Callable[[str, int, int], None]


def calibrate(
    model: nn.Module,
    texts: Sequence[torch.Tensor],
    *,
    trim: float = 0.003,
    say: Say = lambda *_: None,
) -> Calibration:
    """Return the ranges of ``model``'s activations over ``texts``, ids [1, tokens].

    The texts are read twice: the range that is kept must be known before what lies
    beyond it can be counted. Raises PassError where no linear over a parameter is
    found, or where activations are no finite numbers.
    """
    found = Calibration(trim=trim)
    runner = GraphRunner(model, use_cache=False)
    runner.add("ranges", lambda gm: _watch_ranges(gm, found))
    runner.add("outliers", lambda gm: _watch_outliers(gm, found))
    for index, name in enumerate(("ranges", "outliers")):
        for number, ids in enumerate(texts):
            say(name, index * len(texts) + number, 2 * len(texts))
            try:
                runner.prefill(name, ids)
            except ValueError as error:
                raise PassError(f"calibration: {error}") from None
    if not found.inputs:
        raise PassError("calibration: the model has no linear over a parameter")
    return found


class _Watch(nn.Module):
    """Hands a value to ``see`` and returns nothing."""

    def __init__(self, see: See) -> None:
        super().__init__()
        self.see = see

    def forward(self, value: torch.Tensor) -> None:
        """Look at the value."""
        self.see(value)


def _watch(gm: fx.GraphModule, node: fx.Node, see: See) -> None:
    name = f"watch_{len(gm._modules)}"
    gm.add_submodule(name, _Watch(see))
    with gm.graph.inserting_after(node):
        gm.graph.call_module(name, (node,))


def named_inputs(gm: fx.GraphModule) -> dict[fx.Node, list[tuple[str, int]]]:
    """Return, by input, the names and input widths of the weights it is multiplied by.

    Linears that share an input share its statistics.
    """
    found: dict[fx.Node, list[tuple[str, int]]] = {}
    for site in ModelGraph(gm).linears:
        name = parameter_name(site.weight)
        if name and not site.unsupported():
            shape = site.weight.meta["example_value"].shape
            width = int(shape[0 if site.transposed else 1])
            found.setdefault(site.input, []).append((name, width))
    return found


def _watch_ranges(gm: fx.GraphModule, found: Calibration) -> None:
    for node, names in named_inputs(gm).items():
        held = InputStatistics.of_width(names[0][1])
        found.inputs |= dict.fromkeys([name for name, _ in names], held)
        _watch(gm, node, held.add)
    for site in ModelGraph(gm).ffn:
        gate = _gate_values(site)
        name = parameter_name(_weight_of(site.down))
        if gate is not None and name:
            found.gates[name] = Magnitudes()
            _watch(gm, gate, found.gates[name].add)
    gm.recompile()


def _watch_outliers(gm: fx.GraphModule, found: Calibration) -> None:
    for node, names in named_inputs(gm).items():
        held = found.inputs[names[0][0]]
        limit = held.clipped(found.trim)
        _watch(gm, node, partial(held.add_outliers, limit=limit))
    gm.recompile()


def _weight_of(linear: fx.Node) -> Any:
    return argument(linear, 2 if op_name(linear) == "addmm" else 1, "weight")


def _gate_values(site: FfnSite) -> fx.Node | None:
    """Return the node with act(gate) of a gated FFN; None for a plain one."""
    if site.gate is None:
        return None
    users, seen = list(site.gate.users), set[fx.Node]()
    while users:
        node = users.pop()
        if op_name(node) == site.activation:
            return node
        if node not in seen and op_name(node) not in ("mul", "linear"):
            seen.add(node)
            users += node.users
    return None
