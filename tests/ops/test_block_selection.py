"""``graphopt::select_blocks`` against plain Python, and what must hold of its lists."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.ops.block_list import BlockList
from graphopt.ops.block_selection import select_blocks, select_blocks_reference
from graphopt.ops.visit import visit_attention
from tests.ops.block_lists import block_map, empty_lists
from tests.ops.block_oracle import antidiagonal, block_sparse
from tests.oracle import TOLERANCE, tensors

# (blocks, stride, threshold, block) of six heads and of four.
MIXED = ([3, 0, 0, 3, 2, 5], [0, 8, 4, 0, 16, 0], [0.5, 0.9, 0.7, 0.6, 0.8, 1.0], 64)
STRIDED = ([0], [4, 8, 16, 16, 8, 0], [0.7], 128)


def padding(kind, batch, keys):
    place = torch.arange(keys)[None]
    return {
        "none": None,
        "left": place >= torch.tensor([[keys // 3], [0]])[:batch],
        "right": place < torch.tensor([[keys], [keys // 2 + 1]])[:batch],
        "holes": torch.rand(batch, keys) < 0.7,
    }[kind]


def expected_blocks(q, k, key_mask, offset, head, group, tables, scale, softcap):
    """The oracle's blocks of one head of one batch row, [(R, K)] in own blocks."""
    blocks, stride, threshold = tables
    shown = [True] * k.shape[1] if key_mask is None else key_mask.tolist()
    rows, keys = q[head].double().tolist(), k[head // group].double().tolist()
    if stride:
        rest = (offset, stride, threshold, scale, softcap)
        return antidiagonal(rows, keys, shown, *rest), 128
    return block_sparse(rows, keys, shown, offset, blocks, scale), 64


@pytest.mark.parametrize("kind", ["none", "left", "right", "holes"])
@pytest.mark.parametrize(
    ("queries", "keys"),
    [(1, 1), (128, 128), (256, 256), (131, 131), (70, 300), (5, 261), (200, 321)],
)
def test_is_the_oracle(queries, keys, kind):
    """Lengths that are multiples of block, stride and tile, and others."""
    tables = ([2, 0, 0], [0, 4, 16], [0.9, 0.6, 0.9])
    compare_with_oracle(queries, keys, kind, tables)


@settings(max_examples=12, deadline=None)
@given(
    st.integers(1, 200), st.integers(0, 150),
    st.sampled_from(["none", "left", "holes"]), st.integers(1, 4),
    st.sampled_from([4, 8, 16]), st.floats(0.1, 0.99), st.integers(0, 9),
)  # fmt: skip
def test_is_the_oracle_at_any_length(
    queries, past, kind, blocks, stride, threshold, seed
):
    tables = ([blocks, 0, 0], [0, stride, 8], [threshold] * 3)
    compare_with_oracle(queries, queries + past, kind, tables, seed)


def compare_with_oracle(queries, keys, kind, tables, seed=0):
    q, k, _ = tensors(3, 1, queries, keys, 4, batch=2, seed=seed)
    q, key_mask, offset = 3 * q, padding(kind, 2, keys), keys - queries
    arguments = (q, k, key_mask, *tables, 64, offset, 0.5, 2.0)
    for found in (
        select_blocks(*arguments),
        BlockList(*select_blocks_reference(*arguments), (0, 1, 2), 64),
    ):
        kept = block_map(found, keys)
        for b in range(2):
            mask = None if key_mask is None else key_mask[b]
            for head in range(3):
                own = tuple(t[head] for t in tables)
                expected, size = expected_blocks(
                    q[b], k[b], mask, offset, head, 3, own, 0.5, 2.0
                )
                for row in range(-(-queries // 64)):
                    blocks = expected[row * 64 // size]
                    wide = {
                        j * size // 64 + i for j in blocks for i in range(size // 64)
                    }
                    wide = sorted(j for j in wide if j < kept.shape[3])
                    assert kept[b, head, row].nonzero()[:, 0].tolist() == wide


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("tables", [MIXED, STRIDED], ids=["mixed", "strided"])
@pytest.mark.parametrize("kind", ["none", "left", "right", "holes"])
@pytest.mark.parametrize(
    ("queries", "keys", "cap"),
    [(1, 700, 256), (1024, 1024, 256), (1000, 1000, 2), (333, 777, 1), (1600, 1600, 9)],
)
def test_the_kernel_is_the_reference(queries, keys, cap, kind, tables, dtype):
    q, k, _ = tensors(6, 2, queries, keys, 16, dtype, batch=2)
    key_mask = padding(kind, 2, keys)
    rest = (keys - queries, 0.7, 3.0, 0, cap)
    lists = select_blocks(2 * q, k, key_mask, *tables, *rest)
    runs, count = select_blocks_reference(2 * q, k, key_mask, *tables, *rest)
    assert count.max() <= max(cap, 2)
    # Masses that are equal but for rounding may change places.
    assert (lists.key_blocks != runs).double().mean() < 2e-3
    assert (lists.key_block_count != count).double().mean() < 2e-3


def test_the_reference_is_the_same_in_chunks(monkeypatch):
    q, k, _ = tensors(4, 2, 700, 900, 16)
    arguments = (q, k, None, [3, 0, 0, 4], [0, 8, 8, 0], [0.8], 64, 200)
    whole = select_blocks_reference(*arguments)
    monkeypatch.setattr("graphopt.ops.block_choice._HELD", 1)
    for one, other in zip(select_blocks_reference(*arguments), whole, strict=True):
        assert torch.equal(one, other)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 400), st.integers(0, 300), st.integers(1, 6),
    st.sampled_from([4, 8, 16]), st.floats(0.05, 1.0), st.integers(1, 5),
    st.integers(0, 9), st.sampled_from(["none", "holes"]),
)  # fmt: skip
def test_what_holds_of_every_list(
    queries, past, blocks, stride, threshold, cap, seed, kind
):
    keys = queries + past
    q, k, _ = tensors(4, 2, queries, keys, 16, batch=2, seed=seed)
    tables = ([blocks, 0, 0, blocks + 1], [0, stride, stride, 0], [threshold])
    key_mask = padding(kind, 2, keys)
    lists = select_blocks(q, k, key_mask, *tables, 64, past, cap=cap)
    runs, count = lists.key_blocks.int(), lists.key_block_count
    index = torch.arange(runs.shape[3])
    used = index < count[..., None]
    assert (runs[..., 0] < runs[..., 1])[used].all() and not runs[~used].any()
    apart = runs[..., 1:, 0] > runs[..., :-1, 1]
    assert apart[used[..., 1:]].all()
    mask = lists.visited(queries, keys, past)
    row, key = torch.arange(queries)[:, None] + past, torch.arange(keys)
    assert not (mask & (key > row)).any()
    # The first block and the row block's own keys, each query's own among them.
    start = (row - past) // 64 * 64 + past
    must = (key <= row) & ((key < 64) | (key >= start // 64 * 64))
    assert (mask | ~must).all()
    # More runs only take away: a list under a cap visits all of the nominal one.
    nominal = select_blocks(q, k, key_mask, *tables, 64, past)
    assert (mask | ~nominal.visited(queries, keys, past)).all()


@pytest.mark.parametrize(
    "tables",
    [([0], [8], [1.0], 128), ([99], [0], [0.9], 64)],
    ids=["strided", "pooled"],
)
def test_the_exact_settings_visit_every_key(tables):
    q, k, _ = tensors(4, 2, 500, 700, 32)
    lists = select_blocks(q, k, None, *tables, 200)
    past = torch.arange(700) <= torch.arange(500)[:, None] + 200
    assert torch.equal(lists.visited(500, 700, 200), past.expand(1, 4, -1, -1))
    key_mask = torch.rand(1, 700) < 0.3
    key_mask[:, 128:260] = False
    shown = select_blocks(q, k, key_mask, *tables, 200).visited(500, 700, 200)
    assert (shown | ~(past & key_mask)).all()


def test_order_of_heads_and_batch_does_not_matter():
    q, k, _ = tensors(4, 2, 300, 300, 16, batch=3)
    key_mask = torch.rand(3, 300) < 0.8
    plain = select_blocks(q, k, key_mask, [2, 0, 3, 0], [0, 8, 0, 4], [0.7], 64)
    batch, heads = [2, 0, 1], [2, 3, 0, 1]  # whole groups change places
    moved = select_blocks(
        q[batch][:, heads], k[batch].flip(1), key_mask[batch], [3, 0, 2, 0],
        [0, 4, 0, 8], [0.7], 64,
    )  # fmt: skip
    for one, other in zip(moved[:2], plain[:2], strict=True):
        assert torch.equal(one, other[batch][:, heads])


def test_antidiagonal_finds_a_distant_block():
    """A block that the last queries look at is kept, whatever lies around it."""
    q, k, _ = tensors(2, 1, 1024, 1024, 32)
    direction = torch.nn.functional.normalize(torch.randn(32), dim=0)
    q[:, :, -128:] += 30 * direction
    k[:, :, 260:316] += 30 * direction
    for tables in (([0], [16], [0.5], 128), ([3], [0], [0.5], 64)):
        mask = select_blocks(q, k, None, *tables).visited(1024, 1024, 0)
        assert mask[0, :, 1000, 262:314].all()
        assert mask[0, :, 1000].double().mean() < 0.4


def test_padding_at_the_end_changes_nothing_for_the_others():
    q, k, _ = tensors(4, 2, 400, 400, 16)
    tables = ([3, 0, 0, 2], [0, 8, 4, 0], [0.8], 64)
    alone = select_blocks(q[:, :, :250], k[:, :, :250], None, *tables)
    shown = torch.arange(400)[None] < 250
    padded = select_blocks(q, k, shown, *tables)
    assert torch.equal(
        padded.visited(400, 400, 0)[..., :250, :250], alone.visited(250, 250, 0)
    )


@pytest.mark.parametrize("run", [select_blocks, select_blocks_reference])
def test_below_min_tokens_the_lists_are_empty(run):
    q, k, _ = tensors(4, 2, 200, 200, 16)
    found = run(q, k, None, [3], [0], [0.9], 64, 0, None, 0.0, 201)
    assert not found[0].any() and not found[1].any()


def test_broken_scores_do_no_harm():
    q, k, v = tensors(4, 2, 300, 300, 16)
    q[:, :, 100] = float("nan")
    k[:, :, 7] = float("inf")
    lists = select_blocks(q, k, None, [2, 0, 0, 3], [0, 8, 16, 0], [0.7], 64)
    assert lists.visited(300, 300, 0).any(-1).all()
    visit_attention(q, k, v, None, empty_lists(1, 4), blocks=lists)


@pytest.mark.parametrize(
    ("tables", "message"),
    [
        (([1, 2], [0], [0.9], 64), "a table of 2 values for 4 heads"),
        (([0], [5], [0.9], 64), "stride 5 is not"),
        (([3], [0], [0.9], 128), "lists in blocks of 128 .* blocks of 64"),
    ],
)
def test_tables_that_do_not_fit(tables, message):
    q, k, _ = tensors(4, 2, 20, 20, 16)
    with pytest.raises(ValueError, match=message):
        select_blocks(q, k, None, *tables)


def test_opcheck():
    q, k, v = tensors(4, 2, 300, 300, 32)
    tables = ([3, 0, 0, 2], [0, 8, 16, 0], [0.8], 64)
    operator = torch.ops.graphopt.select_blocks.default
    torch.library.opcheck(operator, (q, k, None, *tables, 0))
    lists = select_blocks(q, k, None, *tables)
    inputs = tuple(t.requires_grad_() for t in (q, k, v))
    rest = (None, *empty_lists(1, 4), [0], 0, None, 0.0, 0, *lists)
    operator = torch.ops.graphopt.visit_attention.default
    torch.library.opcheck(operator, (*inputs, *rest))


def test_one_compiled_graph_serves_every_length():
    ops = torch.ops.graphopt

    def run(q, k, v):
        tables = ([3, 0, 0, 2], [0, 8, 16, 0], [0.8], 64)
        blocks = ops.select_blocks(q, k, None, *tables, 0)
        lists = ops.select_vertical_slash(q, k, None, [0], [0], [0], [0], 0)
        rest = ([0], 0, None, 0.0, 0, *blocks, [0, 1, 2, 3])
        return ops.visit_attention(q, k, v, None, *lists, *rest)

    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(run, backend=counter, dynamic=True)
    for length in (300, 64, 65, 1000, 2, 129):
        q, k, v = tensors(4, 2, length, length, 32)
        torch.testing.assert_close(compiled(q, k, v), run(q, k, v))
    assert counter.frame_count == 1
