"""Int8 linears in Triton: interpreted, compiled ahead of time, on a device."""

from __future__ import annotations

import ast
import re
from dataclasses import dataclass
from itertools import product
from typing import Any
from unittest import mock

import pytest
import torch

from graphopt.codegen.targets import TARGETS
from graphopt.codegen.triton import int8, int8_emit
from graphopt.codegen.triton.int8_ahead import compile_int8
from graphopt.codegen.triton.int8_spec import ProductSpec, RowsSpec
from graphopt.codegen.triton.interpreter import is_interpreted
from graphopt.errors import KernelError
from graphopt.ops.int8 import codes as int8_codes
from graphopt.ops.int8 import cuda
from graphopt.ops.int8.weights import quantize_weight
from tests.oracle import TOLERANCE

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@dataclass(frozen=True)
class Case:
    """One call of the product; ``outliers``: share of the values beyond the codes."""

    dtype: torch.dtype = FP32
    rows: int = 5
    width: int = 100
    outputs: int = 70
    outliers: float = 0.02
    bias: bool = True
    transposed: bool = False
    shadow: bool = True

    def __str__(self) -> str:
        given = {n: v for n, v in vars(self).items() if v != getattr(Case(), n)}
        return " ".join(f"{n}={v}" for n, v in given.items()).replace("torch.", "")

    def operands(self, device: str) -> Any:
        """Activations of range 4, and beyond it up to 90 and down to -70."""
        torch.manual_seed(self.rows)
        x = torch.randn(self.rows, self.width).clamp(-4, 4)
        far = torch.where(torch.rand(x.shape) < 0.5, 90.0, -70.0) * torch.rand(x.shape)
        x = torch.where(torch.rand(x.shape) < self.outliers, far, x).to(self.dtype)
        sizes = (self.width, self.outputs)
        weight = torch.randn(sizes if self.transposed else sizes[::-1]).to(self.dtype)
        weight = weight.t() if self.transposed else weight
        settings = torch.tensor([4.0 / 127, float(self.shadow)])
        codes = int8_codes.quantize(x, settings)
        bias = torch.randn(self.outputs).to(self.dtype) if self.bias else None
        found = (x, codes, settings, *quantize_weight(weight), weight, bias)
        return [None if t is None else t.to(device) for t in found]


CASES = (
    Case(),
    Case(BF16, 70, 130, 33, bias=False),
    Case(FP16, 1, 64, 40, outliers=0.2, transposed=True),
    Case(BF16, 140, 40, 20, outliers=1.0),
    Case(FP32, 9, 33, 17, outliers=0.0),
    Case(BF16, 6, 300, 90, shadow=False),
)


def close(actual: torch.Tensor, expected: torch.Tensor, dtype: torch.dtype) -> None:
    assert actual.dtype == dtype and actual.shape == expected.shape
    limit = TOLERANCE[dtype] * max(float(expected.abs().max()), 1.0)
    assert (actual.double() - expected.double()).abs().max() <= limit


def wide(operands: Any) -> Any:
    """Operands whose result is not rounded."""
    x, *rest = operands
    return x.double(), *rest


def check_product(case: Case, device: str = "cpu") -> None:
    """The kernels against the reference, twice the same bits."""
    operands = case.operands(device)
    expected = cuda.shadow_reference(*wide(operands))
    actual = int8.shadow_product(*operands)
    close(actual, expected, case.dtype)
    assert torch.equal(int8.shadow_product(*operands), actual)
    x, codes, settings, *made, _, bias = operands
    # What the host does not know: with the shadow's kernels, but none wanted.
    without = torch.stack([settings[0], torch.zeros_like(settings[1])])
    spec = ProductSpec(case.dtype, True, has_bias=case.bias)
    plain = int8._product(spec, x, (codes, without, *made), [x, operands[5]], bias)
    operands[2] = without
    close(plain, cuda.shadow_reference(*wide(operands)), case.dtype)
    assert torch.equal(int8.shadow_product(*operands), plain)
    assert torch.equal(plain, actual) == (not case.shadow or case.outliers == 0)


def check_lists(device: str = "cpu") -> None:
    """Not only the first and last channels, and what is no number."""
    case = Case(FP32, 260, 90, 16, outliers=0.0)
    for at, value in (((0, 0), 9.0), ((130, 89), -9.0), ((259, 44), float("inf"))):
        x, _, settings, *rest = case.operands(device)
        x[at] = value
        codes = int8_codes.quantize(x, settings)
        given = (x, codes, settings, *rest)
        actual, expected = int8.shadow_product(*given), cuda.shadow_reference(*given)
        assert torch.equal(actual.isfinite(), expected.isfinite())
        assert actual.isfinite().all(1).sum() == 260 - (value == float("inf"))
        kept = expected.isfinite()
        close(actual[kept], expected[kept], FP32)
    x[at] = float("nan")
    actual = int8.shadow_product(x, codes, settings, *rest)
    assert actual.isnan().any(1).nonzero().tolist() == [[259]]


FEW = (
    Case(FP32, 1, 1200, 70),
    Case(BF16, 1, 530, 33, bias=False),
    Case(FP16, 2, 64, 300),
    Case(BF16, 3, 300, 70),
    Case(FP16, 16, 130, 20, bias=False),
    Case(FP32, 7, 33, 5),
)


def check_rows(case: Case, device: str = "cpu") -> None:
    """One split or many: each against the reference, twice the same bits."""
    x, _, _, codes, scales, _, bias = case.operands(device)
    given = (x[None], codes, bias, scales)
    expected = cuda.rows_reference(x[None].double(), *given[1:])
    for programs in (1, 256):
        with mock.patch.object(int8, "_PROGRAMS", programs):
            actual = int8.weight_only(*given)
            close(actual, expected, case.dtype)
            assert torch.equal(int8.weight_only(*given), actual)


def check_operators(device: str = "cpu") -> None:
    """What the operators call on a GPU, from a float weight to the result."""
    for case in (Case(BF16, 20, 64, 20, transposed=True), Case(bias=False)):
        x, codes, settings, made, scales, weight, bias = case.operands(device)
        stored = torch.nn.Parameter(weight.t() if case.transposed else weight)
        rest = (case.transposed, False)
        found = cuda.coded_weights([stored], [case.transposed], False)
        assert torch.equal(found[0], made) and torch.equal(found[1], scales)
        assert cuda.codes_of(stored, *rest)[0] is found[0]
        args = (x[None], stored, bias, codes[None], settings, 0.0, 1, *rest)
        given = (x.double(), codes, settings, made, scales, weight, bias)
        expected = cuda.shadow_reference(*given)[None]
        close(cuda.shadow_linear(*args), expected, case.dtype)
        steps = x.float().abs().amax(-1, keepdim=True) / 127
        given = (int8_codes.coded(x.float() / steps), steps, made, scales, bias)
        expected = cuda.token_reference(x.double(), *given)[None]
        close(cuda.int8_linear(x[None], stored, bias, *rest), expected, case.dtype)
    with pytest.raises(KernelError, match="weights = 'memory'"):
        cuda.codes_of(stored, False, True)


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


SHADOW, SINGLE = ProductSpec(BF16, True, has_bias=True), ProductSpec(FP32, True)
BOTH = ("sm_90", "gfx942")
BUILT = [
    *((SHADOW, kernel, name) for kernel in ("collect", "product") for name in BOTH),
    *((SHADOW, "mark", BOTH[0]), (SINGLE, "product", BOTH[1])),
    *((RowsSpec(BF16, 1), "sums", name) for name in BOTH),
    *(
        (RowsSpec(FP16, 8, True), "sums", BOTH[0]),
        (RowsSpec(FP32, 16), "sums", BOTH[1]),
    ),
    (RowsSpec(BF16, 1), "merge", BOTH[0]),
]


@pytest.mark.skipif(is_interpreted(), reason="nothing is compiled")
@pytest.mark.parametrize(
    ("spec", "kernel", "name"), BUILT, ids=lambda x: getattr(x, "name", x)
)
def test_nothing_spills(spec, kernel, name):
    is_product = isinstance(spec, ProductSpec)
    target = TARGETS[name]
    tile = (spec.tiles(target, 4096) if is_product else spec.tiles())[0]
    compiled = compile_int8(spec, kernel, target, tile)
    assert compiled.spills == 0
    assert compiled.shared_memory <= target.shared_memory
    assert "atom" not in compiled.assembly
    if kernel == "product":
        found = r"wgmma\S+s32\.s8\.s8" if name == "sm_90" else r"mfma_i32\w+_i8"
        assert re.search(found, compiled.assembly)
    if name == "sm_90" and kernel == "sums":  # sixteen codes at a time
        found = (
            r"ld\.global\.v4\.b32" if spec.dtype == BF16 else r"cp\.async\S+ .* 0x10"
        )
        assert re.search(found, compiled.assembly)


def test_the_texts_stand_alone():
    flags = product((False, True), repeat=2)
    specs = [ProductSpec(d, s, has_bias=b) for (s, b), d in product(flags, TOLERANCE)]
    specs += [ProductSpec(BF16, by_token=True)]
    specs += [RowsSpec(d, r, r > 1) for d, r in product(TOLERANCE, (1, 2, 16))]
    assert len({spec.name for spec in specs}) == len(specs)
    for spec in specs:
        source = int8.source_of(spec)
        assert not re.findall(r"^\s*%.*|@[A-Z_]+@", source, re.MULTILINE)
        assert max(map(len, source.splitlines())) <= 88
        for function in ast.parse(source).body:
            if isinstance(function, ast.FunctionDef):
                names = {n.id for n in ast.walk(function) if isinstance(n, ast.Name)}
                assert {a.arg for a in function.args.args} <= names, function.name


def test_the_kernels_have_the_codes_of_the_operators():
    named = (int8_codes.LEAST, int8_codes.MOST, int8_codes.ZERO)
    assert named == (int8_emit.LEAST, int8_emit.MOST, 128)


def test_what_has_no_kernel_is_refused():
    for spec in (ProductSpec, RowsSpec):
        with pytest.raises(KernelError, match=r"no int8 linear for torch\.float64"):
            spec(torch.float64, 1)
