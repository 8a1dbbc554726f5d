"""The Triton kernels on pages: interpreted, and on a CUDA device."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from graphopt.codegen.triton import pages_append, pages_attention
from graphopt.errors import KernelError
from graphopt.ops.pages import append_reference
from tests.codegen.triton.pages_cases import (
    FACTORS,
    SINGLE,
    Case,
    Device,
    check,
    query_of,
)
from tests.codegen.triton.pairwise import pairwise

CASES = [*SINGLE, *(Case(**c) for c in pairwise(FACTORS))]
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_in_the_interpreter(interpreter, case):
    interpreter.submit(check, case).result()


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_on_the_device(case):
    check(case, "cuda")


def lists_of_equal_keys(budget, device):
    """The choice among pages whose keys are all the same."""
    case = Case(pages=30, budget=budget)
    layer = case.layer()
    layer.append(1500, lambda k, v, *rest: append_reference(k.fill_(1.5), v, *rest))
    layer.append(1, append_reference)
    ours = Device(layer, device)
    ours.attend(query_of(case, 0), None, case)
    return ours.layer.selected.cpu()


def check_ties(device="cpu"):
    for budget, pages in ((5, [0, 1, 2, 3, 23]), (1, [0]), (0, [])):
        chosen = lists_of_equal_keys(budget, device)
        assert (chosen[..., :budget] == torch.tensor(pages).int()).all()
        assert (chosen[..., budget:] == -1).all()


def test_of_equal_scores_the_first_pages_are_chosen(interpreter):
    interpreter.submit(check_ties).result()


@pytest.mark.gpu
@on_a_gpu
def test_ties_on_the_device():
    check_ties("cuda")


def check_fewer_splits():
    """The result does not hang on how pages are split among programs."""
    case = Case(pages=12, budget=9, rings=(1,), steps=(700,))
    layer = case.layer()
    layer.append(700, append_reference)
    results = []
    for programs in (1, 12, 1000):
        with mock.patch.object(pages_attention, "_PROGRAMS", programs):
            results.append(Device(layer, "cpu").attend(query_of(case, 0), None, case))
    for result in results[1:]:
        torch.testing.assert_close(result, results[0])


def test_any_number_of_splits_gives_the_same(interpreter):
    interpreter.submit(check_fewer_splits).result()


def test_slots_are_shared_evenly():
    for slots in range(1, 200):
        for heads in (1, 3, 8, 1000):
            splits = pages_attention._splits(slots, heads)
            own = -(-slots // splits)
            assert (splits - 1) * own < slots <= splits * own
            assert splits * heads <= max(heads, pages_attention._PROGRAMS)


def check_refusals():
    layer = Case().layer()
    table = torch.zeros(9, 2, dtype=torch.int32).t()
    key, value = torch.zeros(2, 3, 1, 32), torch.zeros(2, 3, 1, 16)
    with pytest.raises(KernelError, match=r"strides \(1, 2\); .* contiguous"):
        pages_append.launch(key, value, layer.past, table, *layer.full[:4], None)
    with pytest.raises(KernelError, match=r"no Triton pages for torch\.float64"):
        past, table = layer.past, layer.full[4]
        pages_append.launch(
            key.double(), value.double(), past, table, *layer.full[:4], None
        )


def test_what_has_no_kernel_is_refused(interpreter):
    interpreter.submit(check_refusals).result()


def test_this_process_names_the_way_to_interpret():
    case = Case()
    with pytest.raises(KernelError, match="TRITON_INTERPRET=1"):
        Device(case.layer(), "cpu").attend(query_of(case, 0), None, case)


class Decoding:
    """Decoding steps through the operators, their inputs always in the same place."""

    def __init__(self):
        self.case = Case(torch.bfloat16, "int8", rings=(2,), pages=20, interval=2)
        layer = self.case.layer()
        layer.append(500, append_reference)
        layer.past, layer.new = layer.total, 1
        self.layer = Device(layer, "cuda").layer
        shape, dtype = (2, 3, 1), self.case.dtype
        self.key = torch.empty(*shape, 32, device="cuda", dtype=dtype)
        self.value = torch.empty(*shape, 16, device="cuda", dtype=dtype)
        self.query = torch.empty(2, 6, 1, 32, device="cuda", dtype=dtype)

    def fill(self, step):
        torch.manual_seed(step)
        for tensor in (self.key, self.value, self.query):
            tensor.normal_()

    def step(self):
        layer, append = self.layer, torch.ops.graphopt.append_pages
        for heads, held, rest in (
            (slice(0, 2), layer.full, (layer.statistics,)),
            (slice(2, 3), layer.ring, (None, layer.sink_pages, layer.ring_pages)),
        ):
            *pool, table = held
            new = (self.key[:, heads], self.value[:, heads])
            append(*new, layer.past, table, *pool, *rest)
        attend = torch.ops.graphopt.page_attention
        rest = (None, self.case.budget, self.case.interval)
        out = attend(self.query, *layer.held(), *layer.state(), *rest)
        layer.past.add_(1)
        return out


@pytest.mark.gpu
@on_a_gpu
def test_a_cuda_graph_of_a_step_is_replayed_for_every_later_one():
    plain, captured = Decoding(), Decoding()
    for decoding in (plain, captured):  # compile, and make tables, before the capture
        decoding.fill(0)
        decoding.step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = captured.step()
    for step in range(1, 80):  # over the end of a page, and of the ring's first one
        for decoding in (plain, captured):
            decoding.fill(step)
        expected = plain.step()
        graph.replay()
        assert torch.equal(out, expected)
        assert torch.equal(captured.layer.selected, plain.layer.selected)
        assert torch.equal(captured.layer.selected_at, plain.layer.selected_at)
    for mine, other in zip(captured.layer.full, plain.layer.full, strict=True):
        assert torch.equal(mine, other)
