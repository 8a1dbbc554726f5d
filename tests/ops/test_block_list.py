"""Block lists: their size, their runs, and attention over them."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.ops.block_list import BlockList, list_bytes, list_heads, list_shape
from graphopt.ops.block_runs import fill_gaps, runs_of
from graphopt.ops.block_selection import select_blocks
from graphopt.ops.visit import visit_attention
from tests.ops.block_lists import block_map, empty_lists, random_blocks
from tests.ops.test_visit import lists_of, random_places
from tests.oracle import TOLERANCE, assert_close, oracle, tensors


@settings(max_examples=50, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 4), st.integers(1, 900), st.integers(1, 3000),
    st.sampled_from([64, 128]), st.integers(1, 9), st.booleans(),
)  # fmt: skip
def test_the_formula_is_the_bytes(batch, heads, queries, keys, block, cap, small):
    cap = cap if small else 256
    with torch._subclasses.FakeTensorMode():
        q = torch.empty(batch, heads, queries, 16)
        k = torch.empty(batch, heads, keys, 16)
        stride = [16] if block == 128 else [0]
        lists = select_blocks(q, k, None, [5], stride, [0.9], block, cap=cap)
        found = lists.key_blocks.nbytes + lists.key_block_count.nbytes
    assert found == list_bytes(batch, heads, queries, keys, block, cap)


@pytest.mark.parametrize("blocks", [1, 2, 7, 8, 40])
def test_every_other_block_fits(blocks):
    kept = torch.arange(blocks) % 2 == 0
    _, capacity = list_shape(64, 64 * blocks, 64, 256)
    runs, count = runs_of(kept, capacity)
    assert count == (blocks + 1) // 2 == max(capacity, 2) - (blocks < 3)
    assert runs[:count, 0].tolist() == list(range(0, blocks, 2))


def test_memory_at_a_million_tokens():
    assert list_shape(10**6, 10**6, 128, 256) == (7813, 256)
    assert list_bytes(1, 32, 10**6, 10**6, 128) == 256_016_384 + 1_000_064


def test_only_heads_with_a_list_take_memory():
    q, k, _ = tensors(4, 2, 200, 200, 16)
    lists = select_blocks(q, k, None, [3, 0, 0, 3], [0], [0.9], 64)
    assert lists.key_blocks.shape == (1, 2, 4, 2, 2)
    assert lists.heads == (0, -1, -1, 1)
    assert lists.key_blocks.dtype == torch.int16


@settings(max_examples=60, deadline=None)
@given(st.lists(st.booleans(), min_size=1, max_size=60), st.integers(1, 8))
def test_runs_over_the_cap_are_joined_over_the_smallest_gaps(given_blocks, most):
    kept = torch.tensor(given_blocks)
    found = fill_gaps(kept[None], most)[0]
    runs, count = runs_of(kept[None], most)
    spans = runs[0, : count[0]].tolist()
    places = found.nonzero()[:, 0].tolist()
    assert [j for begin, end in spans for j in range(begin, end)] == places
    assert all(one[1] < other[0] for one, other in pairwise(spans))
    assert places == joined_by_hand(given_blocks, most)


def joined_by_hand(kept, most):
    """Fill the smallest gap, the first of equals, one after another."""
    places = [i for i, keep in enumerate(kept) if keep]
    while True:
        gaps = [(b - a, a, b) for a, b in pairwise(places) if b - a > 1]
        if len(gaps) + 1 <= most or not gaps:
            return places
        _, low, high = min(gaps)
        places = sorted({*places, *range(low, high)})


def test_more_blocks_than_int16_counts():
    k = torch.zeros(1, 1, 64 * 32767 + 1, 1).expand(1, 1, -1, 1)
    q = torch.randn(1, 1, 5, 1)
    with pytest.raises(ValueError, match="over 32767 blocks of 64"):
        select_blocks(q, k, None, [3], [0], [0.9], 64, 64 * 32767 - 4)


SHAPES = [
    (4, 2, 64, 1, 1, (1, 0, 1, 1), 64),
    (4, 2, 80, 65, 65, (1, 1, 1, 1), 64),
    (4, 2, 64, 300, 300, (0, 1, 1, 0), 128),
    (3, 1, 96, 63, 500, (1, 1, 1), 128),
    (6, 3, 128, 200, 700, (1, 0, 1, 0, 0, 1), 128),
]


@pytest.mark.parametrize("dtype", [*TOLERANCE, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "queries", "keys", "has_list", "block"), SHAPES
)
def test_one_launch_serves_every_pattern(
    heads, kv_heads, dim, queries, keys, has_list, block, dtype
):
    """Columns and slashes, blocks, dense last rows, padding and soft caps together."""
    q, k, v = tensors(heads, kv_heads, queries, keys, dim, dtype, batch=2)
    offset, rows = keys - queries, [0] * (heads - 1) + [10]
    blocks = random_blocks(queries, keys, offset, has_list, block, batch=2)
    columns = [random_places(min(keys, 3 * h), keys, h) for h in range(heads)]
    slashes = [random_places(min(keys, 1 + h), keys, h) for h in range(heads)]
    lists = lists_of(columns, slashes, keys, batch=2)
    key_mask = torch.rand(2, keys) < 0.8
    mask = lists.visited(rows, queries, keys, offset, blocks) & key_mask[:, None, None]
    assert (mask[:, -1, -1:] == key_mask[:, None]).all()
    actual = visit_attention(
        q, k, v, key_mask, lists, rows, offset, 0.2, 5.0, blocks=blocks
    )
    expected = oracle(q, k, v, mask, 0.2, 5.0)
    assert_close(actual, expected, torch.float32 if dtype == torch.float64 else dtype)


def test_a_list_means_its_blocks_alone():
    blocks = random_blocks(130, 200, 70, (1, 0), 64)
    lists = lists_of([[0, 99], [0, 99]], [[3], [3]], 200)
    mask = lists.visited([0], 130, 200, 70, blocks)
    kept = block_map(blocks, 200)[0, 0]
    for row in range(130):
        expected = kept[row // 64].repeat_interleave(64)[:200].clone()
        expected[row + 71 :] = False
        assert torch.equal(mask[0, 0, row], expected)
    assert torch.equal(mask[:, 1], lists.visited([0], 130, 200, 70)[:, 1])


def test_runs_of_every_key_are_dense():
    q, k, v = tensors(2, 1, 300, 300, 64)
    rows, capacity = list_shape(300, 300, 128, 256)
    runs = runs_of(torch.ones(1, 2, rows, 3, dtype=torch.bool).tril(), capacity)
    blocks = BlockList(*runs, list_heads((True, True)), 128)
    actual = visit_attention(q, k, v, None, empty_lists(1, 2), blocks=blocks)
    dense = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
    )
    assert_close(actual, dense.double(), torch.float32)


@pytest.mark.parametrize(
    ("heads", "rows", "message"),
    [
        ((0,), 200, "block_heads holds 1 values for 2 heads"),
        ((0, 1), 40, "block lists of .1, 2, 2. batch rows"),
        ((0, 2), 200, "the call has .1, 3, 4."),
    ],
)
def test_lists_that_do_not_fit(heads, rows, message):
    q, k, v = tensors(2, 1, 200, 200, 16)
    blocks = random_blocks(rows, 200, 0, (1, 1), 64)._replace(heads=heads)
    with pytest.raises(ValueError, match=message):
        visit_attention(q, k, v, None, empty_lists(1, 2), blocks=blocks)
