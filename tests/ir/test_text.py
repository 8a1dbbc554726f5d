"""Normalised text, dead code and copies of graphs."""

from __future__ import annotations

import subprocess
import sys

import torch
from torch import fx

from graphopt.diff import layer_text
from graphopt.ir.copying import copy_graph
from graphopt.ir.dce import eliminate_dead_code
from graphopt.ir.text import graph_text
from tests.models import TINY, capture, token_ids

PROGRAM = """
from graphopt.ir.text import graph_text
from tests.models import TINY, capture, token_ids
print(graph_text(capture(TINY["llama"](), input_ids=token_ids(2, 13))[0]), end="")
"""


def test_the_same_in_another_process_and_for_another_length():
    here = graph_text(capture(TINY["llama"](), input_ids=token_ids(2, 29))[0])
    there = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, check=True
    ).stdout
    assert here == there


def test_layers_read_alike():
    gm = capture(TINY["llama"](), input_ids=token_ids(2, 13))[0]
    first, second = (layer_text(graph_text(gm), i).splitlines() for i in (0, 1))
    own = [line.replace("L0.", "L1.") for line in first if line.startswith("%L0")]
    shared = sum(line in second for line in own)
    assert shared > 30


def test_a_copy_is_apart_from_its_original():
    gm = capture(TINY["llama"](), input_ids=token_ids(2, 13))[0]
    before = graph_text(gm)
    copy = copy_graph(gm.graph)
    for node in list(copy.nodes)[-3:-1]:
        node.meta["example_value"] = None
    assert graph_text(gm) == before


def test_dead_code_goes_and_side_effects_stay():
    graph = fx.Graph()
    x = graph.placeholder("x")
    added = graph.call_function(torch.add, (x, 1))
    added.meta["example_value"] = torch.empty(1)
    graph.call_function(torch.neg, (x,))  # no value is known: it may be an effect
    graph.call_method("copy_", (x, x))
    graph.call_method("add_", (x, 1))
    graph.call_function(torch.manual_seed, (0,))
    graph.output(graph.call_function(torch.mul, (x, 2)))
    gm = fx.GraphModule(torch.nn.Module(), graph)
    eliminate_dead_code(gm)
    names = [n.name for n in gm.graph.nodes]
    assert names == ["x", "neg", "copy_", "add_", "manual_seed", "mul", "output"]
