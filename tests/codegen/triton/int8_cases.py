"""Calls of int8 linears in Triton, and what must hold for each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch

from graphopt.codegen.triton import int8
from graphopt.codegen.triton.int8_spec import ProductSpec
from graphopt.errors import KernelError
from graphopt.ops.int8 import coded_weights, cuda
from graphopt.ops.int8 import codes as int8_codes
from graphopt.ops.int8.cuda_reference import (
    rows_reference,
    shadow_reference,
    token_reference,
)
from graphopt.ops.int8.weights import quantize_weight
from tests.oracle import TOLERANCE

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


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
    expected = shadow_reference(*wide(operands))
    actual = int8.shadow_product(*operands)
    close(actual, expected, case.dtype)
    assert torch.equal(int8.shadow_product(*operands), actual)
    x, codes, settings, *made, _, bias = operands
    # What the host does not know: with the shadow's kernels, but none wanted.
    without = torch.stack([settings[0], torch.zeros_like(settings[1])])
    spec = ProductSpec(case.dtype, True, has_bias=case.bias)
    plain = int8._product(spec, x, (codes, without, *made), [x, operands[5]], bias)
    operands[2] = without
    close(plain, shadow_reference(*wide(operands)), case.dtype)
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
        actual, expected = int8.shadow_product(*given), shadow_reference(*given)
        assert torch.equal(actual.isfinite(), expected.isfinite())
        assert actual.isfinite().all(1).sum() == 260 - (value == float("inf"))
        kept = expected.isfinite()
        close(actual[kept], expected[kept], FP32)
    x[at] = float("nan")
    actual = int8.shadow_product(x, codes, settings, *rest)
    assert actual.isnan().any(1).nonzero().tolist() == [[259]]


FEW = (
    Case(FP32, 1, 1200, 20),
    Case(BF16, 1, 530, 33, bias=False),
    Case(FP16, 2, 64, 30),
    Case(BF16, 3, 300, 70),
    Case(FP16, 16, 130, 20, bias=False),
    Case(FP32, 7, 33, 5),
)


def check_rows(case: Case, device: str = "cpu") -> None:
    """One split or many: each against the reference, twice the same bits."""
    x, _, _, codes, scales, _, bias = case.operands(device)
    given = (x[None], codes, bias, scales)
    expected = rows_reference(x[None].double(), *given[1:])
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
        found = coded_weights([stored], [case.transposed], False)
        assert torch.equal(found[0], made) and torch.equal(found[1], scales)
        assert cuda.codes_of(stored, *rest)[0] is found[0]
        args = (x[None], stored, bias, codes[None], settings, 0.0, 1, *rest)
        given = (x.double(), codes, settings, made, scales, weight, bias)
        expected = shadow_reference(*given)[None]
        close(cuda.shadow_linear(*args), expected, case.dtype)
        steps = x.float().abs().amax(-1, keepdim=True) / 127
        given = (int8_codes.coded(x.float() / steps), steps, made, scales, bias)
        expected = token_reference(x.double(), *given)[None]
        close(cuda.int8_linear(x[None], stored, bias, *rest), expected, case.dtype)
    with pytest.raises(KernelError, match="weights = 'memory'"):
        cuda.codes_of(stored, False, True)
