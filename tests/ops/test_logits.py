"""Combined logits and tokens sampled from them, against float64, and as operators."""

from __future__ import annotations

import itertools

import pytest
import torch

from graphopt.codegen.cpp import combine as kernel
from graphopt.ops.logits import combine_logits, combine_sample, nucleus, sample_logits
from tests.ops.logits import members, oracle, settings, wide
from tests.oracle import TOLERANCE

_ops = torch.ops.graphopt
NEVER = -torch.inf


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("pairs", [0, 1, 3])
def test_logits_are_the_sum_in_float32(dtype, pairs):
    given = members(3, 50, pairs, dtype)
    base, tuned, reference, weights, beta = wide(given)
    expected = base[:, :51] if pairs else base
    for t, r, w in zip(tuned, reference, weights, strict=True):
        size = min(expected.shape[1], t.shape[1], r.shape[1])
        expected = expected[:, :size] + beta * w * (t[:, :size] - r[:, :size])
    found = combine_logits(*given)
    assert found.dtype == torch.float32 and found.shape == expected.shape
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-6)


def test_identities_are_exact():
    base, tuned, reference, weights, beta = members(2, 70, 2)
    size = 70
    none = combine_logits(base, tuned, reference, weights, torch.tensor(0.0))
    assert torch.equal(none, base[:, :size])
    same = combine_logits(base, tuned, tuned, weights, beta)
    assert torch.equal(same, base[:, :size])
    one = combine_logits(base, tuned, reference, weights, beta)
    other = combine_logits(base, tuned[::-1], reference[::-1], weights.flip(0), beta)
    assert torch.equal(one, other)
    first, whole = reference[0][:, :size], torch.ones(1)
    own = combine_logits(first, tuned[:1], [first], whole, torch.tensor(1.0))
    torch.testing.assert_close(own, tuned[0][:, :size], atol=1e-5, rtol=0)


def excluding(factor):
    """Base 1, and every case of infinities of tuned and reference."""
    base = torch.tensor([[1.0, 1.0, 1.0, 1.0, NEVER, NEVER]])
    tuned = torch.tensor([[2.0, NEVER, 2.0, NEVER, 2.0, NEVER]])
    reference = torch.tensor([[3.0, 3.0, NEVER, NEVER, 3.0, NEVER]])
    return base, [tuned], [reference], torch.tensor([factor]), torch.tensor(1.0)


@pytest.mark.parametrize(
    ("factor", "excluded"), [(0.5, NEVER), (0.0, 1.0), (-0.5, 1.0)]
)
def test_infinities_are_no_nan(factor, excluded):
    given = excluding(factor)
    expected = [1.0 - factor, excluded, 1.0, 1.0, NEVER, NEVER]
    assert combine_logits(*given).tolist() == [expected]
    assert combine_sample(*given).tolist() == [expected.index(max(expected))]
    numbers = torch.tensor([0.9999])
    assert combine_sample(*given, numbers).tolist() == [3]


@pytest.mark.parametrize("bad", [torch.nan, NEVER])
def test_rows_without_a_token(bad):
    base = torch.randn(3, 5000)
    base[1] = NEVER
    base[1, 4321] = bad
    base[2, 17] = bad
    given = ([], [], torch.zeros(0), torch.tensor(1.0))
    expected = [False, True, bad != NEVER]
    for how in ((), (torch.rand(3),), (torch.rand(3), None, torch.tensor(0.5), True)):
        assert (combine_sample(base, *given, *how) < 0).tolist() == expected
        double = combine_sample(base.double(), *given, *how)
        assert (double < 0).tolist() == expected


SIZES = [(1, 100, 1), (3, 9000, 2), (2, 4097, 0)]
HOW = list(itertools.product((None, 0.6), (None, 0.9, 0.2, 1.0), (False, True)))


@pytest.mark.parametrize("sizes", SIZES, ids=str)
@pytest.mark.parametrize("drawn", [False, True])
def test_tokens_are_those_of_float64(sizes, drawn):
    for seed, how in enumerate(HOW):
        given = members(*sizes, seed=seed)
        more = settings(sizes[0], drawn, *how)
        assert torch.equal(combine_sample(*given, *more), oracle(given, *more))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_types_are_widened_first(dtype):
    given, more = members(4, 5000, 1, dtype), settings(4, True, 0.8, 0.9, False)
    assert torch.equal(combine_sample(*given, *more), oracle(given, *more))
    mixed = (given[0].float(), *given[1:])
    assert torch.equal(combine_sample(*mixed, *more), oracle(given, *more))
    strided = torch.stack([given[0], given[0]], -1)[..., 0]
    assert torch.equal(combine_sample(strided, *given[1:], *more), oracle(given, *more))


def test_threads_change_no_token():
    before = torch.get_num_threads()
    given, more = members(3, 30_000, 1), settings(3, True, 0.9, 0.8, True)
    found = []
    try:
        for threads in (1, 2, 4):
            torch.set_num_threads(threads)
            found.append(combine_sample(*given, *more))
    finally:
        torch.set_num_threads(before)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])


def test_tokens_come_as_often_as_they_should():
    base, *rest = members(1, 12, 1, scale=1.0)
    draws, more = 20_000, (torch.tensor(0.7), torch.tensor(0.9), False)
    rows = [base.expand(draws, -1), [t.expand(draws, -1) for t in rest[0]]]
    rows.append([t.expand(draws, -1) for t in rest[1]])
    numbers = torch.rand(draws, generator=torch.Generator().manual_seed(1))
    tokens = combine_sample(*rows, *rest[2:], numbers, *more)
    logits = combine_logits(base, *rest)[0] / 0.7
    expected = logits.masked_fill(~nucleus(logits, 0.9), NEVER).softmax(-1)
    found = tokens.bincount(minlength=len(expected)) / draws
    assert (found - expected).abs().sum() / 2 < 0.02
    assert not found[expected == 0].any()


@pytest.mark.parametrize("of_base", [False, True])
def test_the_filter_is_that_of_transformers(of_base):
    from transformers import TopPLogitsWarper

    logits, large = torch.randn(2, 4, 1000).mul(2).unbind()
    judged = large if of_base else logits
    kept = TopPLogitsWarper(0.7)(None, judged).isfinite()
    assert torch.equal(nucleus(judged, 0.7), kept)
    numbers = torch.rand(4)
    given = (numbers, None, torch.tensor(0.7), large if of_base else None)
    alone = sample_logits(logits.masked_fill(~kept, NEVER), numbers)
    assert torch.equal(sample_logits(logits, *given), alone)


def test_equal_tokens_stay_together():
    logits = torch.tensor([[0.0, 1.0, 1.0, 1.0, 0.0]]).log_softmax(-1)
    assert nucleus(logits, 0.3).tolist() == [[False, True, True, True, False]]
    numbers = torch.linspace(0, 0.999, 50)
    found = sample_logits(logits.expand(50, -1), numbers, None, torch.tensor(0.3))
    assert found.unique().tolist() == [1, 2, 3]
    assert sample_logits(logits).tolist() == [1]


@pytest.mark.parametrize("edge", [0.0, 1.0])
def test_numbers_at_the_ends(edge):
    logits = torch.tensor([[NEVER, 2.0, NEVER, 1.0, NEVER]])
    expected = 1 if edge == 0 else 3
    assert sample_logits(logits, torch.tensor([edge])).tolist() == [expected]
    assert sample_logits(logits.double(), torch.tensor([edge])).tolist() == [expected]


def test_opcheck():
    given, more = members(2, 40, 1), settings(2, True, 0.8, 0.9, True)
    torch.library.opcheck(_ops.combine_logits.default, given)
    torch.library.opcheck(_ops.combine_sample.default, (*given, *more))
    large = torch.randn(2, 42)
    more = (more[0], more[1], more[2], large)
    torch.library.opcheck(_ops.sample_logits.default, (given[0], *more))


def test_gradients_flow_through_combined_logits():
    base, tuned, reference, weights, beta = wide(members(2, 9, 2))
    free = [base, *tuned, *reference, weights, beta]
    free = [t.requires_grad_() for t in free]
    torch.autograd.gradcheck(
        lambda b, t, u, r, s, w, k: combine_logits(b, [t, u], [r, s], w, k), free
    )


def test_mistakes_have_messages():
    base, tuned, reference, weights, beta = members(2, 9, 2)
    with pytest.raises(ValueError, match="give one of each a pair"):
        combine_logits(base, tuned, reference[:1], weights, beta)
    meta = torch.empty(2, 3, 9, device="meta")
    with pytest.raises(ValueError, match=r"give \[B, V\]"):
        _ops.sample_logits(meta)


def test_the_source_stands_alone():
    assert "@" not in kernel.emit_combine()
