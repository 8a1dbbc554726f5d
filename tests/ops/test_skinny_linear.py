"""``graphopt::skinny_linear`` against a float64 oracle, and as an operator."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from graphopt.ops import skinny_linear
from tests.oracle import TOLERANCE

SHAPES = [(1, 64, 32), (3, 80, 17), (4, 7, 1)]


def operands(rows, width, outputs, dtype=torch.float32, bias=True):
    torch.manual_seed(rows)
    x = torch.randn(1, rows, width, dtype=dtype)
    weight = torch.randn(outputs, width, dtype=dtype)
    return x, weight, torch.randn(outputs, dtype=dtype) if bias else None


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("sizes", SHAPES)
@pytest.mark.parametrize("compiled", [False, True])
def test_oracle(sizes, dtype, compiled):
    args = operands(*sizes, dtype)
    expected = F.linear(*(a.double() for a in args))
    run = torch.compile(skinny_linear) if compiled else skinny_linear
    actual = run(*args)
    assert actual.dtype == dtype
    limit = TOLERANCE[dtype] * float(expected.abs().max())
    assert (actual.double() - expected).abs().max() <= limit


def test_is_an_operator_with_derivatives():
    args = operands(2, 16, 8, torch.float64)
    op = torch.ops.graphopt.skinny_linear
    checks = torch.library.opcheck(op.default, args)
    assert set(checks.values()) == {"SUCCESS"}
    for a in args:
        a.requires_grad_()
    assert torch.autograd.gradcheck(op, args)


def test_without_bias_and_leading_sizes():
    x, weight, _ = operands(4, 16, 8, bias=False)
    x = x.view(2, 2, 16)
    torch.testing.assert_close(skinny_linear(x, weight), F.linear(x, weight))
