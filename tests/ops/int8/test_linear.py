"""Int8 linears against plain products of the same codes, and against float64."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from graphopt.codegen.cpp.shadow import add_shadow
from graphopt.errors import KernelError
from graphopt.ops.int8 import weights
from graphopt.ops.int8.prepare import prepared, statistics_of
from graphopt.ops.int8.weights import ShadowColumns, on_file, quantize_weight

shadow = torch.ops.graphopt.shadow_linear.default
dynamic = torch.ops.graphopt.int8_linear.default
quantize = torch.ops.graphopt.quantize.default


def operands(rows, width, outputs, beyond=0, dtype=torch.float32):
    """Activations of range 4, with ``beyond`` channels that have values far beyond."""
    torch.manual_seed(rows)
    x = torch.randn(1, rows, width).clamp(-4, 4)
    for channel in torch.randperm(width)[:beyond].tolist():
        x[0, torch.randint(rows, (1,)), channel] = 90.0 if channel % 2 else -70.0
    weight = torch.nn.Parameter(torch.randn(outputs, width).to(dtype))
    return x.to(dtype), weight, torch.randn(outputs).to(dtype)


def settings(x, is_shadowed, most=4.0):
    scale = most if is_shadowed else float(x.abs().max())
    return torch.tensor([scale / 127, float(is_shadowed)])


def run(x, weight, bias, row, capacity=0.5, room=2, transposed=False, to_file=False):
    args = (quantize(x, row), row, capacity, room, transposed, to_file)
    return shadow(x, weight, bias, *args)


def reference(x, weight, bias, row):
    """In float64: codes times codes, and what lies beyond them times the weight."""
    scale, has_shadow = row.tolist()
    codes, scales = quantize_weight(weight.detach())
    inner = (x.float() / row[0]).round().clamp(-128, 127).double() * scale
    result = F.linear(inner, codes.double() * scales.double()[:, None])
    if has_shadow:
        wide = x.double()
        beyond = wide - wide.clamp(-128 * scale, 127 * scale)
        result = result + F.linear(beyond, weight.double())
    return result if bias is None else result + bias.double()


@torch.no_grad()
@pytest.mark.parametrize("is_shadowed", [False, True])
@pytest.mark.parametrize("sizes", [(1, 64, 32), (5, 33, 17), (70, 576, 96)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_equals_the_plain_product_of_the_codes(sizes, is_shadowed, dtype):
    x, weight, bias = operands(*sizes, beyond=3, dtype=dtype)
    row = settings(x, is_shadowed)
    expected = reference(x, weight, bias, row)
    stored = torch.nn.Parameter(weight.detach().t().contiguous())
    for actual in (
        run(x, weight, bias, row),
        run(x, stored, bias, row, transposed=True),
        run(x.transpose(0, 1), weight, bias, row).transpose(0, 1),
    ):
        assert actual.dtype == dtype and actual.shape == expected.shape
        limit = (1e-5 if dtype == torch.float32 else 1e-2) * expected.abs().max()
        assert (actual.double() - expected).abs().max() <= limit


@torch.no_grad()
def test_a_shadow_is_nearer_than_a_scale_that_holds_everything():
    x, weight, bias = operands(70, 576, 96, beyond=3)
    exact = F.linear(x.double(), weight.double(), bias.double())

    def error(actual):
        return float((actual.double() - exact).norm() / exact.norm())

    with_shadow = error(run(x, weight, bias, settings(x, True)))
    without = error(run(x, weight, bias, settings(x, False)))
    by_token = error(dynamic(x, weight, bias, False, False))
    assert with_shadow < 0.02 < without
    assert by_token < without


@torch.no_grad()
def test_more_outliers_than_room_are_multiplied_in_float_and_counted():
    x, weight, bias = operands(9, 64, 16, beyond=5)
    row = settings(x, True)
    exact = run(x, weight, bias, row, capacity=4 / x.numel())
    assert torch.equal(exact, F.linear(x, weight, bias))
    assert not torch.equal(run(x, weight, bias, row, capacity=5 / x.numel()), exact)
    assert statistics_of(weight)["overflows"] == 1
    assert statistics_of(bias) is None


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 40])
def test_outliers_are_found_wherever_they_are(rows, dtype):
    for width in (1, 15, 16, 127, 128, 200):
        x, columns = torch.randn(rows, width), torch.randn(width, 19)
        x = x.clamp(-2, 2).to(dtype)
        wanted = sorted({0, width // 2, width - 1})
        for channel in wanted:
            x[channel % rows, channel] = -9.0 if channel % 2 else 8.5
        used, out = torch.zeros(width, dtype=torch.uint8), torch.randn(rows, 19)
        beyond = x.double() - x.double().clamp(-3.0, 2.5)
        expected = out.double() + beyond @ columns.double()
        assert add_shadow(x, -3.0, 2.5, columns, used, 3, out) == len(wanted)
        assert used.nonzero().flatten().tolist() == wanted
        torch.testing.assert_close(out.double(), expected, atol=1e-4, rtol=1e-5)
    assert add_shadow(x, -3.0, 2.5, columns, used, 0, out) > 0
    assert add_shadow(x, -99.0, 99.0, columns, used, 0, out) == 0


@torch.no_grad()
def test_columns_stay_while_there_is_room(kernel_cache):
    table = torch.randn(6, 4)
    columns = ShadowColumns(*on_file(table)[:1], 2, on_file(table)[1])
    for channels in ([0, 1], [1], [2], [1]):
        x, out = torch.zeros(1, 6), torch.zeros(1, 4)
        x[:, channels] = 3.0
        columns.add(x, (-1.0, 1.0), 6, out)
        torch.testing.assert_close(out[0], 2 * table[channels].sum(0))
    # The third call has one more than there is room for, and all go.
    assert (columns.fetched, columns.kept) == (4, 1)


@torch.no_grad()
def test_weights_on_a_file_are_the_same_weights(kernel_cache):
    x, weight, bias = operands(9, 64, 16, beyond=2)
    before, expected = weight.detach().clone(), F.linear(x, weight, bias)
    row, made = settings(x, True), prepared.made
    first = run(x, weight, bias, row, to_file=True)
    assert torch.equal(weight, before) and torch.equal(
        F.linear(x, weight, bias), expected
    )
    assert torch.equal(run(x, weight, bias, row, to_file=True), first)
    assert prepared.made == made + 1
    weight.mul_(2)  # a private map: neither the file nor other maps change
    assert torch.allclose(
        run(x, weight, None, row, to_file=True),
        2 * run(x, torch.nn.Parameter(before), None, row),
        rtol=1e-4,
    )
    assert not list(kernel_cache.glob("*.bin"))


def test_a_file_that_cannot_be_written(monkeypatch, tmp_path):
    monkeypatch.setattr(weights, "cache_dir", lambda: tmp_path / "missing")
    with pytest.raises(KernelError, match="weights = 'memory'"):
        on_file(torch.randn(3))


@torch.no_grad()
def test_rows_of_zeros():
    x, weight, bias = operands(3, 16, 4)
    weight[1] = 0
    row = settings(x, False)
    assert torch.equal(run(x, weight, bias, row)[..., 1], bias[1].expand(1, 3))
    zeros = torch.zeros(1, 3, 16)
    assert torch.equal(dynamic(zeros, weight, bias, False, False)[0, 0], bias)


def test_are_operators_with_straight_through_derivatives():
    x, weight, bias = operands(3, 16, 8)
    row = settings(x, False)
    args = (x, weight, bias, quantize(x, row), row, 0.5, 2, False, False)
    torch.library.opcheck(shadow, args)
    torch.library.opcheck(dynamic, (x, weight, bias, False, False))
    leaf = x.clone().requires_grad_()
    run(leaf, weight, bias, row).sum().backward()
    torch.testing.assert_close(leaf.grad, weight.detach().sum(0).expand_as(x))
