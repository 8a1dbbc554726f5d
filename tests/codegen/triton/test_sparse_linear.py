"""Triton kernels that skip weights: interpreted, compiled, on a device."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch

from graphopt.codegen.targets import TARGETS
from graphopt.codegen.triton import sparse_linear as kernel
from graphopt.codegen.triton.interpreter import is_interpreted
from graphopt.codegen.triton.sparse_linear_ahead import KERNELS, compile_sparse
from graphopt.codegen.triton.sparse_linear_spec import SparseSpec
from graphopt.errors import KernelError
from graphopt.ops.sparse_linear import sparse_linear_reference
from graphopt.ops.sparse_up import sparse_up_reference
from tests.oracle import TOLERANCE

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
GPUS = tuple(name for name, t in TARGETS.items() if t.is_gpu)
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@dataclass(frozen=True)
class Case:
    """One call of each kernel."""

    dtype: torch.dtype = FP32
    rows: int = 1
    width: int = 100
    outputs: int = 150
    bias: bool = True
    threshold: float = 0.7

    def __str__(self) -> str:
        given = {n: v for n, v in vars(self).items() if v != getattr(Case(), n)}
        return " ".join(f"{n}={v}" for n, v in given.items()).replace("torch.", "")

    def operands(self, device: str) -> Any:
        torch.manual_seed(self.rows)
        sizes = ((self.rows, self.width), (self.outputs, self.width), (self.outputs,))
        made = [torch.randn(s).to(self.dtype).to(device) for s in sizes]
        gate = torch.randn(self.rows, self.outputs).to(self.dtype).to(device)
        at = torch.tensor(self.threshold, device=device)
        return *made[:2], made[2] if self.bias else None, gate, at


CASES = (
    Case(),
    Case(FP16, 2, 130, 128),
    Case(BF16, 3, 64, 40, bias=False),
    Case(FP32, 8, 33, 17, threshold=0.0),
    Case(BF16, 1, 600, 300, bias=False),
    Case(FP32, 5, threshold=100.0),
)


def close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype == dtype and actual.shape == expected.shape
    limit = TOLERANCE[dtype] * max(float(expected.abs().max()), 1.0)
    assert (actual.cpu().double() - expected).abs().le(limit).all()


def check(case: Case, device: str = "cpu") -> None:
    """Both kernels against their references in float64, twice the same bits."""
    x, weight, bias, gate, at = case.operands(device)
    wide = [None if t is None else t.cpu().double() for t in (x, weight, bias, gate)]
    by_input = weight.t().contiguous()
    actual = kernel.columns(x, by_input, bias, at)
    close(actual, sparse_linear_reference(*wide[:3], at.cpu()), case.dtype)
    assert torch.equal(kernel.columns(x, by_input, bias, at), actual)
    if case.threshold == 100:
        assert torch.equal(actual, bias.expand(actual.shape))
    actual = kernel.neurons(x, weight, bias, gate, at)
    close(actual, sparse_up_reference(*wide, at.cpu()), case.dtype)
    x[0, 3] = gate[0, 5] = float("nan")
    assert kernel.columns(x, by_input, bias, at)[0].isnan().all()
    assert kernel.neurons(x, weight, bias, gate, at)[0, 5].isnan()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_in_the_interpreter(interpreter, case):
    interpreter.submit(check, case).result()


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_on_the_device(case):
    check(case, "cuda")


@pytest.mark.gpu
@on_a_gpu
def test_a_cuda_graph_is_replayed_for_other_inputs():
    case = Case(BF16, 1, 4096, 4096, bias=False)
    x, weight, bias, gate, at = case.operands("cuda")
    weight = torch.nn.Parameter(weight, requires_grad=False)

    def step():
        product = torch.ops.graphopt.sparse_up(x, weight, bias, gate, at)
        return torch.ops.graphopt.sparse_linear(product, weight, bias, at)

    step()  # compiles and turns the weight, outside of the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step()
    for seed in (1, 2):
        torch.manual_seed(seed)
        x.normal_()
        gate.normal_()
        graph.replay()
        assert torch.equal(out, step())


def check_splits() -> None:
    case = Case(width=1000)
    x, weight, bias, _, at = case.operands("cpu")
    expected = sparse_linear_reference(*(t.double() for t in (x, weight, bias)), at)
    spec = SparseSpec("columns", FP32, 1, True)
    for programs in (1, 8, 1000):
        with mock.patch.object(kernel, "_PROGRAMS", programs):
            found, steps = kernel.splits(spec, 1000, 150)
            assert found * steps * spec.tile.block_m >= 1000
            out = kernel.columns(x, weight.t().contiguous(), bias, at)
        close(out, expected, FP32)


def test_any_number_of_splits(interpreter):
    interpreter.submit(check_splits).result()


BUILT = (
    (SparseSpec("columns", BF16, 1), GPUS),
    (SparseSpec("columns", FP32, 8, True), GPUS),
    (SparseSpec("columns", FP16, 3, True), GPUS[:1]),
    (SparseSpec("neurons", BF16, 1), GPUS),
    (SparseSpec("neurons", FP32, 8, True), GPUS),
    (SparseSpec("neurons", FP16, 3, True), GPUS[-1:]),
)


@pytest.mark.skipif(is_interpreted(), reason="nothing is compiled")
@pytest.mark.parametrize(
    ("spec", "name"),
    [(spec, name) for spec, names in BUILT for name in names],
    ids=lambda x: getattr(x, "name", x),
)
def test_nothing_spills(spec, name):
    kernels = KERNELS[spec.kind] if spec.has_bias else KERNELS[spec.kind][:1]
    for one in kernels:
        compiled = compile_sparse(spec, one, TARGETS[name])
        assert compiled.spills == 0
        assert compiled.shared_memory <= TARGETS[name].shared_memory
        assert "atom" not in compiled.assembly
        if name == "sm_90" and spec.dtype == BF16:
            assert re.search(r"ld\.global\.v4\.b32", compiled.assembly)


def test_the_texts_stand_alone():
    specs = [SparseSpec(k, d, r, b) for k in KERNELS for d in TOLERANCE
             for r in (1, 8) for b in (False, True)]  # fmt: skip
    assert len({spec.name for spec in specs}) == len(specs)
    for spec in specs:
        source = kernel.emit(spec)
        assert not re.findall(r"^\s*%.*|@[A-Z_]+@", source, re.MULTILINE)
        assert max(map(len, source.splitlines())) <= 88
        for function in ast.parse(source).body:
            if isinstance(function, ast.FunctionDef):
                names = {n.id for n in ast.walk(function) if isinstance(n, ast.Name)}
                assert {a.arg for a in function.args.args} <= names, function.name


def test_what_has_no_kernel_is_refused():
    with pytest.raises(KernelError, match=r"no sparse linear for torch\.float64"):
        SparseSpec("columns", torch.float64, 1)
