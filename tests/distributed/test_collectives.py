"""Collectives in graphs: counted, made functional, and never lost by a pass."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    parallelize_module,
)

from graphopt.distributed import localise
from graphopt.errors import PassError
from graphopt.ir.collectives import count_collectives, is_collective, sum_over_ranks
from graphopt.ir.dce import eliminate_dead_code
from graphopt.ir.match import op_name
from graphopt.passes.base import Pass, PassResult, Selects
from graphopt.pipeline import PipelineOptions, run_passes


@pytest.fixture(autouse=True)
def two_ranks():
    """One process that takes itself for the first of two; nothing is exchanged."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    yield
    dist.destroy_process_group()


@dataclass(frozen=True, kw_only=True)
class Drops(Pass):
    """Goes on with this rank's part where there was the sum."""

    name: ClassVar[str] = "drops"

    def run(self, model, context):
        found = [n for n in model.gm.graph.nodes if op_name(n).endswith("wait_tensor")]
        for node in found:
            summed = node.args[0]
            node.replace_all_uses_with(summed.args[0])
            model.gm.graph.erase_node(node)
            model.gm.graph.erase_node(summed)
        return PassResult(True)


@dataclass(frozen=True, kw_only=True)
class Adds(Pass):
    """Sums over the ranks once more."""

    name: ClassVar[str] = "adds"

    def run(self, model, context):
        graph = model.gm.graph
        like = next(n for n in graph.nodes if is_collective(n))
        (output,) = graph.find_nodes(op="output")
        (result,) = output.args[0]
        with graph.inserting_before(output):
            output.args = ((sum_over_ranks(graph, like, result),),)
        return PassResult(True)


@dataclass(frozen=True, kw_only=True)
class Ranks(Pass):
    """Would rank neurons against one another."""

    name: ClassVar[str] = "ranks"

    @property
    def selects_over(self) -> Selects:
        return "neurons"

    def run(self, model, context):
        raise AssertionError("a part of the neurons is not enough")


def in_place(x, weight):
    y = torch.nn.functional.linear(x, weight)
    dist.all_reduce(y)
    return y + 1


def through_a_view(x, weight):
    y = torch.nn.functional.linear(x, weight)
    rows = y.view(-1)
    dist.all_reduce(rows)
    return y + 1


def graph_of(function):
    found = []

    def backend(gm, inputs):
        found.append((gm, inputs))
        return gm.forward

    with torch.no_grad():
        torch.compile(function, backend=backend)(torch.randn(3, 4), torch.randn(5, 4))
    return found[0]


def names(gm):
    return [op_name(node) for node in gm.graph.nodes]


def test_what_is_written_back_is_read_where_it_is_made():
    gm, inputs = graph_of(in_place)
    assert "copy_" in names(gm) and count_collectives(gm) == 1
    assert localise(gm, inputs).remark is None
    assert "copy_" not in names(gm) and count_collectives(gm) == 1
    add = next(n for n in gm.graph.nodes if op_name(n) == "add")
    assert op_name(add.args[0]) == "_c10d_functional.wait_tensor"
    assert eliminate_dead_code(gm) == 0


def test_shared_memory_is_written_as_before():
    gm, inputs = graph_of(through_a_view)
    localise(gm, inputs)
    assert "copy_" in names(gm)
    eliminate_dead_code(gm)
    assert "copy_" in names(gm) and count_collectives(gm) == 1


def test_a_pass_that_drops_a_collective_is_undone():
    gm, inputs = graph_of(in_place)
    localise(gm, inputs)
    (record,) = run_passes(gm, [Drops()])
    assert "of 1 collectives 1 are gone" in record.remarks[0].message
    assert record.remarks[0].kind == "failure"
    assert count_collectives(gm) == 1
    gm, _ = graph_of(in_place)
    with pytest.raises(PassError, match="collectives"):
        run_passes(gm, [Drops()], PipelineOptions(verify="off", strict=True))


def test_a_pass_may_add_collectives():
    gm, inputs = graph_of(in_place)
    localise(gm, inputs)
    (record,) = run_passes(gm, [Adds()], PipelineOptions(strict=True))
    assert record.changed and count_collectives(gm) == 2


def test_a_pass_that_needs_all_ranks_is_refused():
    gm, _ = graph_of(in_place)
    (record,) = run_passes(gm, [Ranks()])
    assert [r.code for r in record.remarks] == ["sharded"]
    assert "neurons" in record.remarks[0].message


def test_operators_on_dtensors_become_local_ones():
    model = nn.Sequential(
        nn.Embedding(20, 8), nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 20)
    )
    plan = {
        "0": RowwiseParallel(input_layouts=Replicate()),
        "1": ColwiseParallel(),
        "2": RowwiseParallel(),
        "3": ColwiseParallel(output_layouts=Replicate()),
    }
    parallelize_module(model, dist.init_device_mesh("cpu", (2,)), plan)
    found = []

    def backend(gm, inputs):
        local = localise(gm, inputs)
        found.append((gm, local))
        return lambda *given: gm(*local.arguments(given))

    with torch.no_grad():
        ids = torch.randint(0, 20, (3, 5))
        result = torch.compile(model, backend=backend, dynamic=True)(ids)
    assert result.shape == (3, 5, 20)
    ((gm, local),) = found
    assert local.remark.code == "local" and len(local.sharded) == 7
    # The embedding and the second linear are summed, the logits gathered.
    assert names(gm).count("linear") == 3 and count_collectives(gm) == 3
    values = [n.meta.get("example_value") for n in gm.graph.nodes]
    assert not any(isinstance(value, DTensor) for value in values)
    inputs = gm.graph.find_nodes(op="placeholder")
    weights = [inputs[i].meta["example_value"] for i in local.sharded]
    assert all(isinstance(weight, nn.Parameter) for weight in weights)


def test_derivatives_go_through_dtensors():
    model = nn.Sequential(nn.Linear(8, 16))
    mesh = dist.init_device_mesh("cpu", (2,))
    parallelize_module(model, mesh, {"0": ColwiseParallel()})
    found = []

    def backend(gm, inputs):
        found.append(localise(gm, inputs))
        return gm.forward

    torch.compile(model, backend=backend)(torch.randn(3, 8))
    (local,) = found
    assert local.remark.code == "sharded" and "no_grad" in local.remark.message
    assert local.sharded == ()
