"""Cut the graph of a whole model into the graphs of a pipeline's stages."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import SymInt, fx

from graphopt._compat import copy_source
from graphopt.errors import ModelError
from graphopt.integrations.pipelining.members import Members
from graphopt.ir.loops import find_loop
from graphopt.ir.match import value_of
from graphopt.ir.model_graph import ModelGraph

_MARK = "graphopt_stage"  # in a node's meta: the stage that the node is the input of


@dataclass(frozen=True)
class Part:
    """The graph of one stage, and how it fits into the whole one.

    ``module`` takes the inputs of the whole graph at the places ``inputs`` and what the
    stage before sends; it gives ``sent`` to the stage behind, and behind these its
    results. ``results`` says for each output of the whole graph which of those it is;
    None for what another stage computes.
    """

    module: fx.GraphModule
    inputs: tuple[int, ...]
    received: tuple[fx.Node, ...]
    sent: tuple[fx.Node, ...]
    results: tuple[int | None, ...]


def mark_stages(gm: fx.GraphModule, stages: int, expected: int | None = None) -> None:
    """Note in ``gm`` where each of so many stages begins, in whole layers.

    The notes outlive passes. Raises ModelError for a model of fewer layers, or of
    others than ``expected``, or whose layers do not follow one another along a residual
    stream.
    """
    layers = ModelGraph(gm).layers
    if expected is not None and len(layers) != expected:
        raise ModelError(
            f"pipelining: {len(layers)} layers with attention were found in the graph "
            f"of a model of {expected}; `graphopt explain` shows what was recognised"
        )
    if len(layers) < stages:
        raise ModelError(
            f"pipelining: {stages} stages of a model in which {len(layers)} layers "
            "were found; use fewer stages"
        )
    for stage, first in enumerate(bounds(len(layers), stages)):
        node = layers[first].input
        before = layers[first - 1].output if first else node
        if node is None or before is None:
            raise ModelError(
                f"pipelining: the hidden states between layers {first - 1} and {first} "
                "were not found, so that the model cannot be cut there; `graphopt "
                "explain` shows what was recognised"
            )
        before.meta[_MARK] = stage


def bounds(layers: int, stages: int) -> list[int]:
    """Return the first layer of each stage; the later stages have no more than others.

    The last one has the head beside its layers.
    """
    each, more = divmod(layers, stages)
    sizes = [each + (stage < more) for stage in range(stages)]
    return [sum(sizes[:stage]) for stage in range(stages)]


def cut(gm: fx.GraphModule, stages: int) -> list[Part]:
    """Return the parts of a graph that `mark_stages` has marked; ``gm`` stays.

    Raises ModelError where a pass has removed a mark, or put the layers into a loop.
    """
    if find_loop(gm) is not None:
        raise ModelError(
            "pipelining: chunked-prefill puts all layers into one loop; leave it out, "
            "micro-batches are chunks already"
        )
    marks = {n.meta[_MARK]: n for n in gm.graph.nodes if _MARK in n.meta}
    if sorted(marks) != list(range(stages)):
        lost = min(set(range(stages)) - set(marks))
        raise ModelError(
            f"pipelining: a pass replaced the hidden states where stage {lost} begins; "
            "use another number of stages, or leave out passes that rewrite them"
        )
    start, *ends = (marks[stage] for stage in range(stages))
    members = Members(gm.graph, start, ends)
    return [_part(gm, members, stage) for stage in range(stages)]


def _part(gm: fx.GraphModule, members: Members, stage: int) -> Part:
    nodes = members.nodes(stage)
    received = members.crossing(stage - 1) if stage else []
    sent = members.crossing(stage) if stage < members.stages - 1 else []
    graph = fx.Graph()
    mapping: dict[fx.Node, fx.Node] = {}
    places = _copy_inputs(gm, nodes, graph, mapping)
    for node in received:
        _check_sent(node)
        mapping[node] = graph.placeholder(f"received_{node.name}")
        mapping[node].meta = {"example_value": value_of(node)}
    for node in nodes:
        mapping[node] = graph.node_copy(node, mapping.__getitem__)
    outputs = _flat(gm)
    own = [n for n in outputs if n in mapping]
    graph.output((*(mapping[n] for n in sent), *(mapping[n] for n in own)))
    results = [own.index(n) if n in mapping else None for n in outputs]
    module = fx.GraphModule(gm, graph)
    module.meta = dict(gm.meta)
    return Part(module, tuple(places), tuple(received), tuple(sent), tuple(results))


def _copy_inputs(
    gm: fx.GraphModule, nodes: Sequence[fx.Node], graph: fx.Graph, mapping: Any
) -> list[int]:
    """Give ``graph`` the inputs that ``nodes`` read; return their places."""
    read = {n for node in nodes for n in node.all_input_nodes}
    read |= set(_flat(gm))
    places = []
    for place, node in enumerate(gm.graph.find_nodes(op="placeholder")):
        # Sizes are kept: those of what is received are made of them.
        if node in read or isinstance(value_of(node), SymInt):
            places.append(place)
            mapping[node] = graph.placeholder(node.name)
            mapping[node].meta = dict(node.meta)
            copy_source(node, mapping[node])
    return places


def _flat(gm: fx.GraphModule) -> list[Any]:
    """Return what the graph gives: Dynamo's graphs give a flat tuple."""
    given: Any = gm.graph.output_node().args[0]
    return list(given) if isinstance(given, (tuple, list)) else [given]


def _check_sent(node: fx.Node) -> None:
    value = value_of(node)
    if not isinstance(value, torch.Tensor):
        raise ModelError(
            f"pipelining: a later stage reads {node.name}, a {type(value).__name__} "
            "that an earlier one computes; only tensors are sent. Leave out passes "
            "that change the number of tokens between layers"
        )
