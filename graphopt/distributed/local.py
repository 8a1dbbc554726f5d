"""A graph over sharded tensors becomes the graph of what this rank holds of them.

transformers' tensor parallelism and torch's ``parallelize_module`` give parameters that
are DTensors, and the graph that Dynamo captures goes in and out of them. Inside one
rank everything is plain tensors and collectives, which is what passes read: heads and
neurons are the local ones, a parameter is a parameter.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt._compat import local_part
from graphopt.ir.collectives import make_functional
from graphopt.ir.constants import fold_float_attributes
from graphopt.ir.copying import copy_graph
from graphopt.ir.dce import eliminate_dead_code
from graphopt.remarks import Remark, analysis, missed


@dataclass(frozen=True)
class LocalGraph:
    """``inputs`` are the example inputs, the parts that this rank holds among them.

    ``sharded`` are the places of the arguments that come as DTensors. ``remark`` tells
    what was done, None in a graph of one process.
    """

    inputs: list[Any]
    sharded: tuple[int, ...] = ()
    remark: Remark | None = None

    def arguments(self, given: Sequence[Any]) -> Sequence[Any]:
        """Return the arguments of a call with this rank's parts of the sharded ones."""
        if not self.sharded:
            return given
        parts = list(given)
        for index in self.sharded:
            parts[index] = local_part(parts[index])
        return parts


def localise(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> LocalGraph:
    """Write ``gm`` over this rank's parts, in place; collectives become functional.

    All of the graph or nothing: where an operator cannot be followed, or derivatives
    are recorded (which go through the sharded tensors), the graph stays over DTensors,
    and the remark says why.
    """
    inputs = list(example_inputs)
    places = gm.graph.find_nodes(op="placeholder")
    sharded = tuple(i for i, n in enumerate(places) if _is_sharded(n))
    if not sharded:
        make_functional(gm)
        return LocalGraph(inputs)
    if reason := _lower(gm):
        return LocalGraph(inputs, remark=missed("graph", "sharded", reason))
    for index in sharded:
        inputs[index] = local_part(inputs[index])
    text = f"{len(sharded)} parameters are this rank's part of sharded ones"
    return LocalGraph(inputs, sharded, analysis("graph", "local", text))


def _is_sharded(node: fx.Node) -> bool:
    """Tell whether an input is a DTensor; who has one has imported what makes them."""
    module = sys.modules.get("torch.distributed.tensor")
    value = node.meta.get("example_value")
    return module is not None and isinstance(value, module.DTensor)


def _lower(gm: fx.GraphModule) -> str:
    """Lower every DTensor of ``gm``; return why not, with the graph as it was."""
    if torch.is_grad_enabled():
        return "derivatives go through DTensors: run inference under torch.no_grad()"
    from graphopt.distributed.lowering import Lowering

    saved = copy_graph(gm.graph)
    try:
        fold_float_attributes(gm)
        Lowering(gm).run()
        make_functional(gm)
        eliminate_dead_code(gm)
        gm.graph.lint()
    except Exception as error:  # whatever an operator of a future release raises
        gm.graph = saved
        text = str(error).splitlines()[0] if str(error) else ""
        return f"an operator on DTensors cannot be followed: {text}"
    return ""
