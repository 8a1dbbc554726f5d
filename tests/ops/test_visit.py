"""``graphopt::visit_attention`` and the selection of its lists."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.ops.selection import select_reference, select_vertical_slash
from graphopt.ops.visit import visit_attention
from graphopt.ops.visit_list import VisitList, from_distances
from tests.oracle import TOLERANCE, assert_close, oracle, tensors

BLOCK = 64


def nominal(columns, distances, queries, keys, offset):
    """The mask written out: columns and 64-wide slashes, [queries, keys]."""
    mask = torch.zeros(queries, keys, dtype=torch.bool)
    for row in range(queries):
        start = row // BLOCK * BLOCK + offset
        for distance in distances:
            low, high = start - distance, start - distance + BLOCK
            mask[row, max(low, 0) : max(high, 0)] = True
        mask[row, list(columns)] = True
        mask[row, row + offset + 1 :] = False
    return mask


def lists_of(columns, distances, keys, batch=1):
    """A `VisitList` [batch, heads] of given columns and distances a head."""
    heads = len(columns)
    kept = torch.zeros(batch, heads, keys, dtype=torch.bool)
    width = max(1, *map(len, columns))
    places = torch.zeros(batch, heads, width, dtype=torch.int32)
    for head in range(heads):
        kept[:, head, list(distances[head])] = True
        places[:, head, : len(columns[head])] = torch.tensor(
            sorted(columns[head]), dtype=torch.int32
        )
    counts = torch.tensor([len(c) for c in columns], dtype=torch.int32)
    runs, run_count = from_distances(kept, max(1, *map(len, distances)))
    return VisitList(runs, run_count, places, counts.expand(batch, heads))


def random_places(count, limit, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randperm(limit, generator=generator)[:count].tolist()


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("heads", "kv_heads", "dim", "queries", "keys"),
    [
        (3, 1, 64, 1, 1),
        (4, 4, 80, 17, 17),
        (4, 1, 96, 63, 63),
        (8, 1, 128, 64, 64),
        (3, 3, 256, 65, 65),
        (9, 3, 64, 1000, 1000),
        (4, 2, 64, 100, 700),
    ],
)
def test_matches_the_mask(heads, kv_heads, dim, queries, keys, dtype):
    q, k, v = tensors(heads, kv_heads, queries, keys, dim, dtype, batch=2)
    columns = [random_places(min(keys, 3 * h), keys, h) for h in range(heads)]
    distances = [random_places(min(keys, 1 + h), keys, 9 + h) for h in range(heads)]
    offset = keys - queries
    masks = [
        nominal(c, d, queries, keys, offset)
        for c, d in zip(columns, distances, strict=True)
    ]
    visit = lists_of(columns, distances, keys, batch=2)
    assert torch.equal(
        visit.visited([0], queries, keys, offset),
        torch.stack(masks).expand(2, -1, -1, -1),
    )
    actual = visit_attention(q, k, v, None, visit, query_offset=offset)
    expected = oracle(q, k, v, torch.stack(masks), dim**-0.5)
    assert_close(actual, expected, dtype)


def test_padding_softcap_strides_and_dense_rows():
    q, k, v = tensors(4, 2, 300, 300, 64, batch=2)
    q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v))
    key_mask = torch.rand(2, 300) < 0.7
    visit = lists_of([[0, 1], [5], [], [40, 250]], [[0], [0, 70], [3], [200]], 300, 2)
    rows = [0, 100, 300, 1]
    mask = visit.visited(rows, 300, 300, 0)
    assert mask[0, 2, 299].all() and mask[0, 1, 299].all() and not mask[0, 0, 299].all()
    actual = visit_attention(q, k, v, key_mask, visit, rows, 0, 0.3, 5.0)
    expected = oracle(q, k, v, mask & key_mask[:, None, None], 0.3, 5.0)
    assert_close(actual, expected, torch.float32)


def test_rows_without_a_key_give_zeros():
    q, k, v = tensors(2, 1, 70, 70, 64)
    visit = lists_of([[], [69]], [[], []], 70)
    out = visit_attention(q, k, v, None, visit)
    assert not out[0, 0].any()
    assert not out[0, 1, :69].any() and torch.equal(out[0, 1, 69], v[0, 0, 69])


def test_below_min_tokens_the_result_is_dense_bit_for_bit():
    q, k, v = tensors(6, 2, 200, 200, 64)
    dense = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
    )
    visit = lists_of([[0]] * 6, [[0]] * 6, 200)
    assert torch.equal(visit_attention(q, k, v, None, visit, min_tokens=201), dense)


def select(q, k, *tables, **options):
    return select_vertical_slash(
        q, k, options.pop("key_mask", None), *tables, **options
    )


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 200), st.integers(0, 150), st.integers(0, 20), st.integers(1, 90),
    st.integers(0, 30), st.integers(0, 30), st.integers(0, 9),
)  # fmt: skip
def test_selected_lists_hold_sinks_window_and_the_past_alone(
    queries, past, sink, window, vertical, slash, seed
):
    keys = queries + past
    q, k, _ = tensors(4, 2, queries, keys, 16, batch=2, seed=seed)
    tables = [[sink], [window], [vertical], [slash]]
    visit = select(q, k, *tables, query_offset=past)
    mask = visit.visited([0], queries, keys, past)
    row, key = torch.arange(queries)[:, None] + past, torch.arange(keys)
    assert not (mask & (key > row)).any()
    must = (key <= row) & ((key < sink) | (row - key < window))
    assert (mask | ~must).all()
    assert (visit.column_count <= sink + vertical).all()
    runs = [visit.runs[..., i, :] for i in range(visit.runs.shape[2])]
    for index, (one, other) in enumerate(pairwise(runs)):
        used = visit.run_count > index + 1
        assert (one[..., 1] < other[..., 0])[used].all()


def test_selection_finds_what_the_last_queries_look_at():
    torch.manual_seed(0)
    q, k, _ = tensors(2, 1, 400, 400, 32)
    direction = torch.nn.functional.normalize(torch.randn(32), dim=0)
    q[:, :, -64:] += 12 * direction
    k[:, :, [37, 211]] = 12 * direction
    visit = select(q, k, [0], [1], [2], [0])
    assert visit.columns[0].tolist() == [[37, 211]] * 2
    # Both columns are seen by 64 queries at as many distances.
    mask = select(q, k, [0], [1], [0], [127]).visited([0], 400, 400, 0)
    assert mask[0, :, 399, 37].all()


def test_order_of_heads_and_batch_does_not_matter():
    q, k, v = tensors(4, 2, 150, 150, 32, batch=3)
    tables = [[2], [16], [5], [7]]
    key_mask = torch.rand(3, 150) < 0.8

    def run(q, k, v, key_mask):
        visit = select(q, k, *tables, key_mask=key_mask)
        return visit_attention(q, k, v, key_mask, visit)

    plain = run(q, k, v, key_mask)
    rows, heads = [2, 0, 1], [2, 3, 0, 1]  # whole groups change places
    moved = run(q[rows][:, heads], k[rows].flip(1), v[rows].flip(1), key_mask[rows])
    torch.testing.assert_close(moved, plain[rows][:, heads])


def test_right_padding_is_passed_over():
    q, k, _ = tensors(2, 1, 300, 300, 32)
    key_mask = torch.arange(300)[None] < 180
    padded = select(q, k, [4], [16], [10], [10], key_mask=key_mask)
    alone = select(q[:, :, :180], k[:, :, :180], [4], [16], [10], [10])
    for one, other in zip(padded, alone, strict=True):
        assert torch.equal(one, other)


def test_heads_have_tables_of_their_own():
    q, k, _ = tensors(3, 1, 200, 200, 32)
    visit = select(q, k, [0, 4, 0], [300, 8, 1], [0, 0, 6], [0, 0, 2])
    mask = visit.visited([0], 200, 200, 0)
    assert torch.equal(mask[0, 0], torch.ones(200, 200).tril().bool())
    assert visit.column_count.tolist() == [[0, 4, 6]]
    assert (visit.run_count[0, 2] <= 3) and visit.run_count[0, 1] == 1


def test_opcheck():
    q, k, v = tensors(4, 2, 80, 80, 32)
    tables = ([2], [16], [5], [7], 0)
    operator = torch.ops.graphopt.select_vertical_slash.default
    torch.library.opcheck(operator, (q, k, None, *tables))
    visit = select(q, k, *tables[:4])
    arguments = tuple(t.requires_grad_() for t in (q, k, v))
    torch.library.opcheck(
        torch.ops.graphopt.visit_attention.default, (*arguments, None, *visit, [0], 0)
    )


def test_memory_of_the_lists_at_a_million_tokens():
    """(1000, 6096) for 32 heads: under 8 MB a layer, by the fake kernel's shapes."""
    with torch._subclasses.FakeTensorMode():
        q = torch.empty(1, 32, 1_000_000, 128)
        k = torch.empty(1, 8, 1_000_000, 128)
        visit = select(q, k, [30], [100], [1000], [6096])
        assert sum(t.numel() * t.element_size() for t in visit) < 8e6


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(
    ("queries", "keys", "softcap"), [(1, 1, 0.0), (40, 40, 3.0), (500, 700, 0.0)]
)
def test_the_kernel_selects_what_the_reference_selects(queries, keys, softcap, dtype):
    q, k, _ = tensors(6, 2, queries, keys, 80, dtype, batch=2)
    key_mask = torch.rand(2, keys) < 0.8
    tables = [[2], [5], [7, 0, 3, 1, 9, 4], [0, 6, 2, 8, 1, 3]]
    rest = (keys - queries, 0.3, softcap)
    found = select_vertical_slash(q, k, key_mask, *tables, *rest)
    expected = VisitList(*select_reference(q, k, key_mask, *tables, *rest))
    # Masses that are equal but for rounding may change places: compare what is seen.
    meant, wanted = (v.visited([0], queries, keys, rest[0]) for v in (found, expected))
    assert (meant != wanted).double().mean() < 1e-3
    assert torch.equal(found.column_count, expected.column_count)


def test_selection_is_the_same_when_scores_do_not_fit(monkeypatch):
    from graphopt.codegen.cpp import select as cpp

    q, k, _ = tensors(4, 2, 600, 600, 32)
    tables = [[2], [5], [20], [30]]
    stored = select(q, k, *tables)
    text = cpp.emit().replace("kStored = 1 << 22", "kStored = 0")
    cpp._kernel.cache_clear()
    monkeypatch.setattr(cpp, "emit", lambda: text)
    again = select(q, k, *tables)
    cpp._kernel.cache_clear()
    for one, other in zip(stored, again, strict=True):
        assert torch.equal(one, other)
