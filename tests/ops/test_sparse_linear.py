"""``graphopt::sparse_linear`` and ``sparse_up`` against float64 oracles."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from graphopt.ops.sparse_linear import prepared
from tests.oracle import TOLERANCE

linear = torch.ops.graphopt.sparse_linear.default
up = torch.ops.graphopt.sparse_up.default
DTYPES = tuple(TOLERANCE)
# Widths and outputs beside and at the length of registers, and beyond a block of sums.
SIZES = [(1, 64, 32), (1, 33, 17), (3, 7, 1), (5, 100, 1100), (8, 130, 40)]
NONE, TYPICAL, ALL = 0.0, 0.7, 100.0


def operands(rows, width, outputs, dtype=torch.float32):
    torch.manual_seed(rows)
    x = torch.randn(1, rows, width, dtype=dtype)
    weight = torch.nn.Parameter(torch.randn(outputs, width, dtype=dtype))
    return x, weight, torch.randn(outputs, dtype=dtype)


def large(x, threshold):
    """What exceeds the threshold, in float64."""
    return x.double() * (x.double().abs() > threshold)


def close(actual, expected, dtype):
    assert actual.dtype == dtype and actual.shape == expected.shape
    limit = TOLERANCE[dtype] * max(float(expected.abs().max()), 1.0)
    assert (actual.double() - expected).abs().le(limit).all()


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("threshold", [NONE, TYPICAL, ALL])
def test_small_inputs_are_left_out(sizes, dtype, threshold):
    x, weight, bias = operands(*sizes, dtype)
    at = torch.tensor(threshold)
    expected = F.linear(large(x, threshold), weight.double(), bias.double())
    stored = torch.nn.Parameter(weight.t().contiguous())
    close(linear(x, weight, bias, at), expected, dtype)
    close(linear(x, stored, bias, at, True), expected, dtype)
    close(linear(x, weight, None, at), expected - bias.double(), dtype)
    if threshold == ALL:
        assert torch.equal(linear(x, weight, bias, at), bias.expand(expected.shape))


@torch.no_grad()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("threshold", [NONE, TYPICAL, ALL])
def test_closed_neurons_are_left_out(sizes, dtype, threshold):
    x, weight, bias = operands(*sizes, dtype)
    gate = torch.randn(1, sizes[0], sizes[2], dtype=dtype)
    gate[..., ::3] = 0
    at = torch.tensor(threshold)
    products = F.linear(x.double(), weight.double(), bias.double())
    expected = large(gate, threshold) * products
    actual = up(x, weight, bias, gate, at)
    close(actual, expected, dtype)
    assert torch.equal(actual == 0, expected == 0)
    fused = torch.cat([weight, weight], 1)[:, : sizes[1]]  # rows farther apart
    assert torch.equal(up(x, fused, bias, gate, at), actual)
    plain = large(gate, threshold) * F.linear(x.double(), weight.double())
    close(up(x, weight, None, gate, at), plain, dtype)


@torch.no_grad()
def test_sums_hang_on_neither_threads_nor_other_rows():
    x, weight, bias = operands(8, 576, 1536)
    gate, at = torch.randn(1, 8, 1536), torch.tensor(TYPICAL)
    before = torch.get_num_threads()
    found = []
    try:
        for threads in (1, 2, 3, 3):
            torch.set_num_threads(threads)
            found.append((linear(x, weight, bias, at), up(x, weight, bias, gate, at)))
    finally:
        torch.set_num_threads(before)
    for columns, neurons in found[1:]:
        assert torch.equal(columns, found[0][0])
        assert torch.equal(neurons, found[0][1])
    for row in range(8):
        one, its = x[:, row : row + 1], gate[:, row : row + 1]
        assert torch.equal(linear(one, weight, bias, at), found[0][0][:, row : row + 1])
        alone = up(one, weight, bias, its, at)
        assert torch.equal(alone, found[0][1][:, row : row + 1])


@torch.no_grad()
def test_nan_is_not_lost():
    x, weight, bias = operands(2, 16, 8)
    at = torch.tensor(TYPICAL)
    x[0, 1, 3] = float("nan")
    assert linear(x, weight, bias, at).isnan().any(-1).tolist() == [[False, True]]
    gate = torch.randn(1, 2, 8)
    gate[0, 0, 5] = float("nan")
    assert up(x.nan_to_num(), weight, bias, gate, at).isnan().sum() == 1


@torch.no_grad()
def test_more_rows_and_other_types_are_computed_densely():
    x, weight, bias = operands(9, 16, 8)
    at = torch.tensor(TYPICAL)
    before = prepared.made
    expected = F.linear(large(x, TYPICAL), weight.double(), bias.double())
    close(linear(x, weight, bias, at), expected, torch.float32)
    wide = linear(x[:, :2].double(), weight.double(), bias.double(), at)
    assert torch.equal(wide, expected[:, :2])
    assert prepared.made == before
    gate = torch.randn(1, 9, 8)
    products = F.linear(x.double(), weight.double(), bias.double())
    close(up(x, weight, bias, gate, at), large(gate, TYPICAL) * products, torch.float32)


@torch.no_grad()
def test_a_weight_is_turned_once_and_again_when_it_changes():
    x, weight, bias = operands(1, 16, 8)
    at, before = torch.tensor(NONE), prepared.made
    for _ in range(3):
        linear(x, weight, bias, at)
    assert prepared.made == before + 1
    weight.mul_(2)
    torch.testing.assert_close(linear(x, weight, bias, at), F.linear(x, weight, bias))
    assert prepared.made == before + 2
    stored = torch.nn.Parameter(weight.t().contiguous())
    linear(x, stored, bias, at, True)
    assert prepared.made == before + 2


@torch.inference_mode()
def test_weights_without_a_version_and_other_layouts():
    x, weight, bias = operands(4, 16, 8)
    turned = x.view(2, 2, 16).transpose(0, 1)
    at = torch.tensor(NONE)
    actual = linear(turned, weight, bias, at)
    torch.testing.assert_close(actual, F.linear(turned, weight, bias))
    assert linear(x[:, :0], weight, bias, at).shape == (1, 0, 8)


def test_are_operators_with_derivatives():
    x, weight, bias = (t.detach().double() for t in operands(3, 16, 8))
    at, gate = torch.tensor(TYPICAL), torch.randn(1, 3, 8, dtype=torch.float64)
    stored = weight.t().contiguous()
    for op, given in (
        (linear, (x, weight, bias, at)),
        (linear, (x, stored, None, at, True)),
        (up, (x, weight, bias, gate, at)),
        (up, (x, weight, None, gate, at)),
    ):
        assert set(torch.library.opcheck(op, given).values()) == {"SUCCESS"}
        leaves = [
            t.clone().requires_grad_() if isinstance(t, torch.Tensor) and t.ndim else t
            for t in given
        ]
        assert torch.autograd.gradcheck(op, leaves)


def test_what_they_decompose_to_are_operators():
    x, weight, bias = (t.detach() for t in operands(3, 16, 8))
    at, gate = torch.tensor(TYPICAL), torch.randn(1, 3, 8)
    ops = torch.ops.graphopt
    for op, given in (
        (ops.sparse_columns.default, (x, weight, bias, at, False)),
        (ops.sparse_neurons.default, (x, weight, bias, gate, at)),
    ):
        assert set(torch.library.opcheck(op, given).values()) == {"SUCCESS"}


def test_thresholds_are_a_table():
    values = [0.0, 0.25, 3.5]
    op = torch.ops.graphopt.thresholds.default
    table = op(values, torch.device("cpu"))
    assert table.dtype == torch.float32 and table.tolist() == values
    table.zero_()
    assert op(values, torch.device("cpu")).tolist() == values
