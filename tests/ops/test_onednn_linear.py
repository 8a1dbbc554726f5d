"""``graphopt::onednn_linear`` against a float64 oracle, and what it keeps."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from graphopt.ops.onednn_linear import prepared
from tests.oracle import TOLERANCE

op = torch.ops.graphopt.onednn_linear.default


def operands(rows, width, outputs, dtype=torch.float32):
    torch.manual_seed(rows)
    x = torch.randn(2, rows, width, dtype=dtype)
    weight = torch.nn.Parameter(torch.randn(outputs, width, dtype=dtype))
    return x, weight, torch.randn(outputs, dtype=dtype)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [(0, 8, 4), (1, 64, 32), (9, 33, 17), (300, 7, 1)])
def test_oracle(sizes, dtype):
    x, weight, bias = operands(*sizes, dtype)
    expected = F.linear(x.double(), weight.double(), bias.double())
    stored = torch.nn.Parameter(weight.t().contiguous())
    limit = TOLERANCE[dtype] * float(expected.abs().max()) if expected.numel() else 0
    for actual in (op(x, weight, bias), op(x, stored, bias, True)):
        assert actual.dtype == dtype and actual.shape == expected.shape
        assert (actual.double() - expected).abs().le(limit).all()
    torch.testing.assert_close(
        op(x.transpose(0, 1), weight, bias), op(x, weight, bias).transpose(0, 1)
    )


def test_is_an_operator_with_derivatives():
    x, weight, bias = operands(3, 16, 8)
    checks = torch.library.opcheck(op, (x, weight, bias))
    assert set(checks.values()) == {"SUCCESS"}
    for transposed in (False, True):
        given = weight.detach().t().contiguous() if transposed else weight.detach()
        leaves = [t.detach().clone().requires_grad_() for t in (x, given, bias)]
        op(*leaves, transposed).square().sum().backward()
        wide = [t.detach().double().requires_grad_() for t in leaves]
        plain = wide[1].t() if transposed else wide[1]
        F.linear(wide[0], plain, wide[2]).square().sum().backward()
        for leaf, oracle in zip(leaves, wide, strict=True):
            torch.testing.assert_close(leaf.grad, oracle.grad.float())


@torch.no_grad()
def test_a_weight_is_laid_out_once_and_again_when_it_changes():
    x, weight, bias = operands(9, 16, 8)
    before = prepared.made
    run = torch.compile(lambda x: op(x, weight, bias))
    for rows in (9, 9, 4):
        run(x[:, :rows])
    assert prepared.made == before + 1
    weight.mul_(2)
    torch.testing.assert_close(run(x), F.linear(x, weight, bias))
    weight.data = torch.randn(8, 16)
    torch.testing.assert_close(run(x), F.linear(x, weight, bias))
    assert prepared.made == before + 3


@torch.inference_mode()
def test_weights_without_a_version():
    x, weight, bias = operands(2, 16, 8)
    torch.testing.assert_close(op(x, weight, bias), F.linear(x, weight, bias))
