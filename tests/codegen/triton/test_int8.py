"""Int8 linears in Triton: interpreted, and on a device."""

from __future__ import annotations

import pytest
import torch

from graphopt.ops.int8 import cuda, cuda_rows  # noqa: F401
from tests.codegen.triton.int8_cases import (
    BF16,
    CASES,
    FEW,
    FP16,
    FP32,
    Case,
    check_lists,
    check_operators,
    check_product,
    check_rows,
)

on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.parametrize("case", CASES, ids=str)
def test_product_in_the_interpreter(interpreter, case):
    interpreter.submit(check_product, case).result()


@pytest.mark.parametrize("case", FEW, ids=str)
def test_rows_in_the_interpreter(interpreter, case):
    interpreter.submit(check_rows, case).result()


@pytest.mark.parametrize("check", [check_lists, check_operators])
def test_others_in_the_interpreter(interpreter, check):
    interpreter.submit(check).result()


LARGE = (
    Case(BF16, 4096, 4096, 1024, outliers=1e-3),
    Case(FP16, 300, 1024, 4096, outliers=0.3, transposed=True),
    Case(BF16, 1, 14336, 4096, bias=False),
)


@pytest.mark.gpu
@on_a_gpu
def test_on_the_device():
    for case in (*CASES, *LARGE):
        check_product(case, "cuda")
    for case in (*FEW, Case(BF16, 1, 14336, 4096), Case(BF16, 8, 4096, 1024)):
        check_rows(case, "cuda")
    check_lists("cuda")
    check_operators("cuda")


@pytest.mark.gpu
@on_a_gpu
def test_a_cuda_graph_is_replayed_for_other_outliers():
    case = Case(BF16, 64, 1024, 512, bias=False)
    x, _, settings, *_, weight, _ = case.operands("cuda")
    weight = torch.nn.Parameter(weight, requires_grad=False)

    def step():
        codes = torch.ops.graphopt.quantize(x, settings)
        args = (x, weight, None, codes, settings, 0.0, 1, False, False)
        return torch.ops.graphopt.shadow_linear(*args)

    step()  # compiles, tunes and turns the weight into codes, outside of the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for share in (0.0, 0.01, 1.0):
        x.normal_()
        x.mul_(torch.where(torch.rand_like(x) < share, 50.0, 1.0))
        graph.replay()
        assert torch.equal(out, step())


@pytest.mark.gpu
@on_a_gpu
def test_operators_on_the_device():
    x, codes, settings, *_, weight, bias = Case(FP32, 3, 32, 16).operands("cuda")
    weight = torch.nn.Parameter(weight)
    args = (x, weight, bias, codes, settings, 0.5, 2, False, False)
    torch.library.opcheck(torch.ops.graphopt.shadow_linear.default, args)
    args = (x, weight, bias, False, False)
    torch.library.opcheck(torch.ops.graphopt.int8_linear.default, args)
    twice = torch.nn.Parameter(weight.double())
    args = (x.double(), twice, bias.double(), codes, settings, 0.5, 2, False, False)
    torch.ops.graphopt.shadow_linear(*args)  # by plain products


def test_weight_only_rows_is_an_operator_with_derivatives():
    x, _, _, codes, scales, _, bias = Case(FP32, 3, 32, 16).operands("cpu")
    rows = torch.ops.graphopt.weight_only_rows.default
    torch.library.opcheck(rows, (x.requires_grad_(), codes, bias, scales))
    rows(x, codes, bias, scales).sum().backward()
    torch.testing.assert_close(x.grad[0], (codes * scales[:, None]).sum(0))
