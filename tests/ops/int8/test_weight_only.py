"""Int8 weights under float activations: the operators alone and compiled."""

from __future__ import annotations

import pytest
import torch

from graphopt._compat import keep_outputs
from graphopt.ops.int8.prepare import coded_weight, prepared
from graphopt.ops.int8.weight_only import FEW_ROWS
from graphopt.ops.int8.weights import quantize_weight

coded = torch.ops.graphopt.coded_weights.default
linear = torch.ops.graphopt.weight_only_linear.default


def operands(rows, width, outputs, dtype=torch.float32):
    torch.manual_seed(rows)
    x = torch.randn(1, rows, width).to(dtype)
    codes, scales = quantize_weight(torch.randn(outputs, width))
    return x, codes, torch.randn(outputs).to(dtype), scales


def oracle(x, codes, bias, scales):
    weight = codes.double() * scales.double()[:, None]
    result = x.double() @ weight.t()
    return result if bias is None else result + bias.double()


@torch.no_grad()
@pytest.mark.parametrize("sizes", [(1, 64, 32), (3, 33, 17), (FEW_ROWS + 1, 48, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("is_biased", [False, True])
def test_equals_the_product_of_what_codes_stand_for(sizes, dtype, is_biased):
    x, codes, bias, scales = operands(*sizes, dtype=dtype)
    bias = bias if is_biased else None
    actual, expected = linear(x, codes, bias, scales), oracle(x, codes, bias, scales)
    assert actual.dtype == dtype and actual.shape == (1, sizes[0], sizes[2])
    close = 1e-5 if dtype == torch.float32 else 2e-2
    error = (actual.double() - expected).abs().max()
    assert error < close * expected.abs().max()


@torch.no_grad()
def test_weights_are_coded_once_and_anew_when_they_change():
    torch.manual_seed(0)
    weights = [torch.nn.Parameter(torch.randn(6, 4)) for _ in range(2)]
    first = coded(weights, [False, True], False)
    again = coded(weights, [False, True], False)
    assert all(a is b for a, b in zip(first, again, strict=True))
    assert [tuple(t.shape) for t in first] == [(6, 4), (6,), (4, 6), (4,)]
    for found, weight in ((first[:2], weights[0]), (first[2:], weights[1].t())):
        for a, b in zip(found, quantize_weight(weight), strict=True):
            assert torch.equal(a, b)
    weights[0].mul_(-2)
    changed = coded(weights, [False, True], False)
    assert torch.equal(changed[0], -first[0]) and changed[2] is first[2]


@torch.no_grad()
def test_float_weights_on_a_file_stay_readable():
    weight = torch.nn.Parameter(torch.randn(64, 96))
    kept, before = weight.clone(), weight.data_ptr()
    codes, _ = coded_weight(weight, False, True)
    assert weight.data_ptr() != before and torch.equal(weight, kept)
    assert coded_weight(weight, False, True)[0] is codes  # moving it changed nothing
    held = prepared.known(weight)
    assert held is not None and held.is_on_file


@torch.no_grad()
def test_compiled_code_never_writes_into_what_is_kept():
    """Scales [N] are as large as a row's result, and dead behind it."""
    keep_outputs(coded)
    torch.manual_seed(0)
    weight = torch.nn.Parameter(torch.randn(48, 48))
    x = torch.randn(1, 48)

    def run(x, weight):
        codes, scales = coded([weight], [False], False)
        return scales * torch.relu(linear(x, codes, None, scales))[0]

    expected = run(x, weight)
    kept = [t.clone() for t in coded([weight], [False], False)]
    compiled = torch.compile(run)
    for _ in range(3):
        torch.testing.assert_close(compiled(x, weight), expected)
    for a, b in zip(kept, coded([weight], [False], False), strict=True):
        assert torch.equal(a, b)
