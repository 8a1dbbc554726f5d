"""The operators on neurons against sorting in Python, and as operators."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.ops.int8.weights import quantize_weight
from graphopt.ops.neurons import (
    check_neurons,
    choose_neurons,
    clear_behind,
    count_neurons,
    count_own,
    count_reference,
    gather_codes,
    gather_neurons,
    gather_reference,
    hold_neurons,
    kept_neurons,
    most_chosen,
    nearest_neurons,
    own_neurons,
    row_linear,
)
from tests.models import padding_mask
from tests.ops.neurons import activations, counts_by_hand
from tests.oracle import TOLERANCE

_ops = torch.ops.graphopt


def counted(count, inner, mask, rows, *rest):
    counts = torch.zeros(rows, inner.shape[-1], dtype=torch.int32)
    count(inner, mask, counts, *rest)
    return counts


@pytest.mark.parametrize("count", [count_neurons, count_reference])
@pytest.mark.parametrize("dtype", [*TOLERANCE, torch.float64], ids=str)
@pytest.mark.parametrize("absolute", [False, True])
@pytest.mark.parametrize("coarse", [False, True])
def test_counts_are_those_of_sorting(count, dtype, absolute, coarse):
    inner = activations(2, 9, 70, dtype, coarse)
    mask = padding_mask([9, 6], 9).bool()
    for parts in (1, 2000, 10_000):
        for rows, real in ((1, None), (1, mask), (2, mask)):
            expected = counts_by_hand(inner, real, rows, parts, absolute, 3)
            actual = counted(count, inner, real, rows, parts, absolute, 3)
            assert torch.equal(actual, expected)


@given(
    st.lists(st.floats(width=32, allow_nan=True), min_size=1, max_size=40),
    st.integers(1, 10_000),
    st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_any_floats(values, parts, absolute):
    inner = torch.tensor([[values]])
    expected = counts_by_hand(inner, None, 1, parts, absolute)
    assert torch.equal(
        counted(count_neurons, inner, None, 1, parts, absolute), expected
    )


def test_flat_tokens_strides_and_what_was_counted_before():
    inner = activations(2, 6, 48)
    mask = torch.rand(2, 9) < 0.6
    narrowed = mask.narrow(1, 3, 6)
    expected = counts_by_hand(inner, narrowed, 2, 2000)
    once = counted(count_neurons, inner.flatten(0, 1), narrowed, 2, 2000)
    assert torch.equal(once, expected)
    across = inner.transpose(1, 2).contiguous().transpose(1, 2)
    count_neurons(across, narrowed, once, 2000)
    assert torch.equal(once, 2 * expected)
    count_neurons(inner, narrowed, once, 2000, fresh=True)
    assert torch.equal(once, expected)


def test_many_tokens_on_threads_count_the_same():
    inner, threads = activations(1, 300, 257, torch.bfloat16), torch.get_num_threads()
    expected = counted(count_reference, inner, None, 1, 2000)
    try:
        for number in (1, 2):
            torch.set_num_threads(number)
            actual = counted(count_neurons, inner, None, 1, 2000)
            assert torch.equal(actual, expected)
    finally:
        torch.set_num_threads(threads)


def test_the_first_of_equal_counts_are_chosen():
    counts = torch.tensor([[3, 9, 3, 3, 0, 9], [0, 0, 0, 0, 0, 0]], dtype=torch.int32)
    indices = torch.full((2, 3), -1)
    choose_neurons(counts, indices)
    assert indices.tolist() == [[0, 1, 5], [0, 1, 2]]


def test_the_nearest_cluster_gives_its_best():
    shares = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.0, 0.1, 0.5, 0.4]])
    counts = torch.tensor([[1, 0, 8, 7], [20, 30, 0, 1], [0, 0, 0, 0]]).int()
    indices = torch.full((3, 2), -1)
    nearest_neurons(counts, shares, indices)
    # Nothing counted: the cluster that is nearest to nothing, which is most even.
    assert indices.tolist() == [[2, 3], [0, 1], [2, 3]]


def test_kept_are_whole_groups():
    assert kept_neurons(1536, 0.4) == 624
    assert kept_neurons(128, 0.5) == 64
    assert kept_neurons(128, 0.001) == 16
    assert kept_neurons(100, 0.99) == 100
    assert kept_neurons(8, 0.1) == 8


CASES = [
    # weight, dim, fused
    ((40, 12), 0, 1),
    ((12, 40), 1, 1),
    ((80, 12), 0, 2),
    ((12, 80), 1, 2),
    ((40,), 0, 1),
    ((80,), 0, 2),
]


@pytest.mark.parametrize("gather", [gather_neurons, gather_reference])
@pytest.mark.parametrize("dtype", [*TOLERANCE, torch.float64], ids=str)
@pytest.mark.parametrize(("shape", "dim", "fused"), CASES)
@pytest.mark.parametrize("rows", [1, 3])
def test_gathers(gather, dtype, shape, dim, fused, rows):
    weight = torch.randn(shape).to(dtype)
    indices = torch.stack([torch.randperm(40)[:16].sort().values for _ in range(rows)])
    places = [[p * 40 + i for p in range(fused) for i in row] for row in indices]
    expected = torch.stack([weight.index_select(dim, torch.tensor(p)) for p in places])
    expected = expected[0] if rows == 1 else expected
    buffer = torch.empty_like(expected)
    gather(weight, indices, buffer, dim, fused)
    assert torch.equal(buffer, expected)


def test_all_neurons_in_order_are_the_weight():
    weight, every = torch.randn(12, 40), torch.arange(40)[None]
    buffer = torch.empty_like(weight)
    gather_neurons(weight, every, buffer, 1)
    assert torch.equal(buffer, weight)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("shape", "dim", "fused"), CASES[:4])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("rows", [1, 3])
def test_gathers_codes(dtype, shape, dim, fused, transposed, rows):
    weight = torch.randn(shape).to(dtype)
    indices = torch.stack([torch.randperm(40)[:16].sort().values for _ in range(rows)])
    places = [[p * 40 + i for p in range(fused) for i in row] for row in indices]
    found = [weight.index_select(dim, torch.tensor(p)) for p in places]
    made = [quantize_weight(x.t() if transposed else x) for x in found]
    codes, scales = (torch.stack(part) for part in zip(*made, strict=True))
    codes, scales = (x[0] if rows == 1 else x for x in (codes, scales))
    buffers = torch.empty_like(codes), torch.empty_like(scales)
    gather_codes(weight, indices, *buffers, dim, fused, transposed)
    assert torch.equal(buffers[0], codes) and torch.equal(buffers[1], scales)


def test_codes_by_inductor_are_the_same():
    torch.manual_seed(0)
    weight, x = torch.randn(12, 40), torch.randn(2, 1, 16)
    indices = torch.stack([torch.randperm(40)[:16].sort().values for _ in range(2)])

    def run(codes, scales):
        gather_codes(weight, indices, codes, scales, 1)
        return row_linear(x, codes, scales=scales)

    def buffers():
        return torch.zeros(2, 12, 16, dtype=torch.int8), torch.zeros(2, 12)

    wanted, found = buffers(), buffers()
    expected = run(*wanted)
    torch.testing.assert_close(torch.compile(run)(*found), expected)
    assert all(map(torch.equal, found, wanted))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("tokens", [1, 2])
def test_rows_have_codes_of_their_own(dtype, flat, tokens):
    x = torch.randn(3, tokens, 24).to(dtype)
    codes = torch.randint(-127, 128, (3, 16, 24))
    scales, bias = torch.rand(3, 16), torch.randn(16).to(dtype)
    weight = codes.double() * scales.double()[..., None]
    expected = torch.einsum("bsk,bnk->bsn", x.double(), weight) + bias.double()
    x, expected = (t.flatten(0, 1) if flat else t for t in (x, expected))
    actual = row_linear(x, codes.to(torch.int8), bias, scales=scales)
    assert actual.dtype == dtype
    limit = TOLERANCE[dtype] * float(expected.abs().max())
    assert (actual.double() - expected).abs().max() <= limit


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("tokens", [1, 2])
def test_rows_have_weights_of_their_own(dtype, transposed, flat, tokens):
    x, weight = torch.randn(3, tokens, 24).to(dtype), torch.randn(3, 16, 24).to(dtype)
    bias = torch.randn(3, 16).to(dtype)
    expected = torch.einsum("bsk,bnk->bsn", x.double(), weight.double())
    expected = expected + bias.double()[:, None]
    given_weight = weight.mT.contiguous() if transposed else weight
    x, expected = (t.flatten(0, 1) if flat else t for t in (x, expected))
    actual = row_linear(x, given_weight, bias, transposed)
    assert actual.dtype == dtype
    limit = TOLERANCE[dtype] * float(expected.abs().max())
    assert (actual.double() - expected).abs().max() <= limit


def test_are_operators():
    inner, counts = activations(2, 5, 40), torch.zeros(2, 40, dtype=torch.int32)
    indices = torch.stack([torch.arange(16), torch.arange(20, 36)])
    weight, buffer = torch.randn(40, 12), torch.zeros(2, 16, 12)
    codes, scales = torch.zeros(2, 16, 12, dtype=torch.int8), torch.rand(2, 16)
    calls = (
        (_ops.count_neurons, (inner, torch.ones(2, 5).bool(), counts, 2000)),
        (_ops.choose_neurons, (counts, indices.clone())),
        (_ops.nearest_neurons, (counts, torch.rand(3, 40), indices.clone())),
        (_ops.gather_neurons, (weight, indices, buffer, 0)),
        (_ops.check_neurons, (indices, [indices.clone()])),
        (
            _ops.hold_neurons,
            (counts, indices.clone(), weight, weight, None, None, None, None, "new"),
        ),
        (_ops.gather_codes, (weight, indices, codes, scales.clone())),
        (_ops.row_linear, (torch.randn(2, 1, 12), buffer, None)),
        (_ops.row_linear, (torch.randn(2, 1, 12), codes, None, False, scales)),
    )
    for op, args in calls:
        checks = torch.library.opcheck(op.default, args)
        assert set(checks.values()) == {"SUCCESS"}, op


def test_what_does_not_fit_is_refused():
    fakes = torch._subclasses.FakeTensorMode()
    with fakes:
        counts, indices = torch.zeros(1, 40).int(), torch.zeros(1, 16).long()
        with pytest.raises(ValueError, match="not of the neurons"):
            count_neurons(torch.zeros(1, 2, 39), None, counts, 2000)
        with pytest.raises(ValueError, match="do not fit counts"):
            _ops.choose_neurons(counts, torch.zeros(2, 16).long())
        with pytest.raises(ValueError, match="clusters of 39"):
            _ops.nearest_neurons(counts, torch.zeros(2, 39), indices)
        with pytest.raises(ValueError, match="does not fit 1 choices"):
            gather_neurons(torch.zeros(40, 12), indices, torch.zeros(15, 12))
        with pytest.raises(ValueError, match=r"scales \(12,\) do not fit 1 choices"):
            codes = torch.zeros(16, 12, dtype=torch.int8)
            gather_codes(torch.zeros(40, 12), indices, codes, torch.zeros(12))


def test_without_the_pass_nothing_stays_chosen():
    indices, others = torch.arange(4)[None], torch.arange(4)[None]
    check_neurons(indices, [others])
    held = (torch.zeros(1, 8).int(), indices, *(torch.zeros(1),) * 2, *(None,) * 4)
    hold_neurons(*held, "use")
    check_neurons(indices, [])
    hold_neurons(*held, "more")
    with pytest.raises(RuntimeError, match="compiled with the pass 'neuron-mask'"):
        check_neurons(others, [indices])


def test_a_rank_finds_its_own_of_the_chosen():
    indices = torch.tensor([[1, 4, 5, 9], [0, 1, 2, 3], [-1, -1, -1, -1]])
    assert count_own(indices, 4, 4).tolist() == [2, 0, 0]
    own = own_neurons(indices, 4, 4, 3)
    assert own.tolist() == [[0, 1, 0], [0, 0, 0], [0, 0, 0]]
    assert own_neurons(indices, 0, 4, 4).tolist()[1] == [0, 1, 2, 3]


@pytest.mark.parametrize(("shape", "dim"), [((6, 5), 0), ((6, 5), 1), ((2, 6, 5), 1)])
def test_what_no_neuron_fills_is_cleared(shape, dim):
    buffer = torch.rand(shape) + 1
    valid = torch.tensor([3] if len(shape) == 2 else [0, 4])
    expected = buffer.clone()
    for row, number in zip(expected.view(-1, 6, 5), valid.tolist(), strict=True):
        row.narrow(dim, number, row.shape[dim] - number).zero_()
    clear_behind(buffer, valid, dim)
    assert torch.equal(buffer, expected)


def test_a_range_is_of_what_was_chosen():
    weight, own = torch.randn(5, 8), torch.tensor([[1, 3, 0], [2, 0, 0]])
    found = most_chosen(weight, own, torch.tensor([2, 0]), 1)
    expected = weight[:, [1, 3]].abs().amax(1)
    assert torch.equal(found, torch.stack([expected, torch.zeros(5)]))
    across = most_chosen(weight.t().contiguous(), own, torch.tensor([2, 0]), 0)
    assert torch.equal(across, found)


@pytest.mark.parametrize("number", [0, 3, 8])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("fused", [1, 2])
def test_a_linear_over_what_is_filled(number, transposed, fused):
    torch.manual_seed(0)
    x, up, down = torch.randn(1, 1, 6), torch.randn(8 * fused, 6), torch.randn(6, 8)
    bias, valid = torch.randn(8 * fused), torch.tensor([number])
    lies = [w.t().contiguous() if transposed else w for w in (up, down)]
    op = torch.ops.graphopt.valid_linear
    args = (x, lies[0], bias, valid, False, transposed, fused)
    inner = op(*args)
    rows = torch.arange(8 * fused) % 8 < number
    expected = torch.nn.functional.linear(x, up, bias) * rows
    torch.testing.assert_close(inner, expected)
    torch.library.opcheck(op, args)
    inner = inner[..., :8]
    args = (inner, lies[1], None, valid, True, transposed)
    torch.testing.assert_close(op(*args), inner @ down.t())
    torch.library.opcheck(op, args)
