"""Appending to pages and reading them."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.ops.pages import LOGICAL, PAGE, append_reference, read_reference
from graphopt.ops.pages.layout import decode, encode
from tests.ops.pages import CODES, Layer

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
append = torch.ops.graphopt.append_pages
read = torch.ops.graphopt.read_pages


@pytest.mark.parametrize(("kind", "steps"), [("int8", 254), ("int4", 15)])
def test_codes_are_off_by_half_a_step(kind, steps):
    torch.manual_seed(0)
    x = torch.randn(5, 7, 32) * torch.rand(5, 7, 1) * 10
    codes, scales = encode(x, torch.empty(0, dtype=CODES[kind]))
    span = x.amax(-1) - x.amin(-1) if kind == "int4" else 2 * x.abs().amax(-1)
    error = (decode(codes, scales, torch.float32) - x).abs().amax(-1)
    assert (error <= 0.51 * span / steps + 2e-3 * span).all()
    assert error.max() > 0


@pytest.mark.parametrize("kind", CODES)
def test_equal_channels_have_a_scale(kind):
    if not kind:
        return
    x = torch.full((2, 8), 3.0)
    codes, scales = encode(x, torch.empty(0, dtype=CODES[kind]))
    assert (decode(codes, scales, torch.float32) - x).abs().max() < 0.02


@pytest.mark.parametrize("rings", [(), (1,), (0, 2)])
@pytest.mark.parametrize("kind", CODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_writes_what_the_reference_writes(dtype, kind, rings):
    ours, theirs = (Layer(kind=kind, rings=rings, dtype=dtype) for _ in range(2))
    for seed, new in enumerate((1, 70, 1, 1, 200, 64)):
        ours.append(new, append, seed)
        theirs.append(new, append_reference, seed)
    parts = [*zip(ours.full[:4], theirs.full[:4], strict=True)]
    parts += [(ours.statistics, theirs.statistics)]
    if rings:  # the last page of a ring takes what nobody reads
        cut = [
            [t if t is None else t[:, :-1] for t in x.ring[:4]] for x in (ours, theirs)
        ]
        parts += zip(*cut, strict=True)
    for mine, other in parts:
        if mine is not None:
            # Nothing is written where no token is: compare with NaN equal to itself.
            known = theirs_known(other)
            torch.testing.assert_close(mine[known], other[known], rtol=0, atol=0)
            assert torch.equal(theirs_known(mine), known)


def theirs_known(x):
    return (
        ~(x.isnan() | x.isinf()) if x.is_floating_point() else torch.ones_like(x).bool()
    )


def test_statistics_are_the_extremes_of_each_part():
    layer = Layer(pages=4)
    for seed, new in enumerate((5, 30, 1, 100)):
        layer.append(new, append, seed)
    keys, _ = layer.all_keys()
    total = keys.shape[2]
    table = layer.full[4]
    for row in range(layer.batch):
        for first in range(0, total, LOGICAL):
            part = keys[row, :, first : min(first + LOGICAL, total)]
            page, place = table[row, first // PAGE], first % PAGE // LOGICAL
            low, high = layer.statistics[:, page, place].unbind(1)
            assert torch.equal(low, part.amin(1))
            assert torch.equal(high, part.amax(1))


@pytest.mark.parametrize("kind", CODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_statistics_are_the_mean_and_its_spread(dtype, kind):
    ours, theirs = (
        Layer(pages=4, dtype=dtype, kind=kind, extremes=False) for _ in range(2)
    )
    for seed, new in enumerate((5, 30, 1, 100)):
        ours.append(new, append, seed)
        theirs.append(new, append_reference, seed)
    read_keys, _ = read(*ours.held(), *ours.state(), 136, dtype)
    table = ours.full[4]
    limit = {torch.bfloat16: 2e-2, torch.float16: 3e-3}.get(dtype, 1e-5)
    for row in range(ours.batch):
        for first in range(0, 136, LOGICAL):
            part = read_keys[row, :, first : min(first + LOGICAL, 136)].double()
            page, place = table[row, first // PAGE], first % PAGE // LOGICAL
            spread = 0.125 * part.std(1, correction=0)
            expected = torch.stack((part.mean(1) - spread, part.mean(1) + spread), 1)
            for layer in (ours, theirs):
                actual = layer.statistics[:, page, place].double()
                torch.testing.assert_close(actual, expected, atol=limit, rtol=limit)


@settings(max_examples=25, deadline=None)
@given(lengths=st.lists(st.integers(1, 130), min_size=1, max_size=5))
def test_what_is_appended_is_read(lengths):
    layer = Layer(pages=11)
    for seed, new in enumerate(lengths):
        layer.append(new, append, seed)
    key, value = read(*layer.held(), *layer.state(), sum(lengths), torch.float32)
    keys, values = layer.all_keys()
    assert torch.equal(key, keys)
    assert torch.equal(value, values)


def test_rows_of_different_lengths_read_zeros_behind_their_end():
    layer = Layer()
    layer.append(90, append)
    layer.past, layer.new = torch.tensor([10, 80]).int(), 0
    layer.append(3, append, seed=1)
    key, _ = read(*layer.held(), *layer.state(), 83, torch.float32)
    first, second = layer.keys
    assert torch.equal(key[0, :, :10], first[0, :, :10])
    assert torch.equal(key[0, :, 10:13], second[0])
    assert not key[0, :, 13:].any()
    assert torch.equal(key[1, :, 80:83], second[1])


def test_rings_read_back_until_they_drop():
    layer = Layer(rings=(1,), sink_pages=1, ring_pages=2)
    layer.append(192, append)
    key, value = read(*layer.held(), *layer.state(), 192, torch.float32)
    assert torch.equal(key, layer.keys[0])
    assert torch.equal(value, layer.values[0])
    layer.append(1, append)
    with pytest.raises(RuntimeError, match="streaming heads keep 192 tokens"):
        read(*layer.held(), *layer.state(), 193, torch.float32)


def test_a_ring_keeps_the_first_and_the_newest_pages():
    layer = Layer(rings=(0,), sink_pages=1, ring_pages=2, pages=9)
    for seed, new in enumerate((300, 1, 99)):
        layer.append(new, append, seed)
    keys, _ = layer.all_keys()
    pool, table = layer.ring[0], layer.ring[4]
    for row in range(layer.batch):
        for page in (0, 5, 6):
            tokens = keys[row, 0, page * PAGE : (page + 1) * PAGE]
            assert torch.equal(pool[0, table[row, page], : len(tokens)], tokens)


@pytest.mark.parametrize("rings", [(), (1,)])
@pytest.mark.parametrize("kind", CODES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_kernel_reads_what_the_reference_reads(dtype, kind, rings):
    layer = Layer(kind=kind, rings=rings, dtype=dtype)
    layer.append(40, append)
    layer.past, layer.new = torch.tensor([3, 40]).int(), 0
    layer.append(75, append, seed=1)
    arguments = (*layer.held(), *layer.state(), 115, dtype)
    for mine, other in zip(read(*arguments), read_reference(*arguments), strict=True):
        assert torch.equal(mine, other)
        assert not mine[0, :, 78:].any()


@pytest.mark.parametrize("kind", CODES)
def test_opcheck(kind):
    layer = Layer(kind=kind)
    layer.append(70, append)
    key, value = layer.keys[0][:, :, :5], layer.values[0][:, :, :5]
    *pool, table = layer.full
    arguments = (key, value, layer.total, table, *pool, layer.statistics)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(append, arguments, test_utils=tests)
    arguments = (*layer.held(), *layer.state(), 70, torch.float32)
    torch.library.opcheck(read, arguments, test_utils=tests)
    torch.testing.assert_close(read(*arguments)[0], read_reference(*arguments)[0])
