"""Ragged batches on pages: what is written where, and attention of all rows at once."""

from __future__ import annotations

import pytest
import torch

from graphopt.ops.pages import (
    PAGE,
    append_ragged_reference,
    ragged_page_attention_reference,
)
from tests.ops.pages import CODES
from tests.ops.ragged_pages import Ragged
from tests.oracle import TOLERANCE, assert_close

append = torch.ops.graphopt.append_ragged
attend = torch.ops.graphopt.ragged_page_attention
PATTERNS = {
    "full": (0, 0),
    "causal": (0, 0),
    "sliding-window": (0, 40),
    "a-shape": (5, 70),
    "streaming": (64, 128),
}
CAUSAL = ("causal", [0], [0])


def int32(*values):
    return torch.tensor(values).int()


def filled(batch, op=append):
    """Pools with past and new tokens of a batch."""
    pools = batch.held_before()
    op(*batch.new(), batch.starts, batch.before, batch.table, *pools)
    return pools


def attended(batch, pools, *rest, op=attend):
    where = (batch.starts, batch.before, batch.table)
    return op(batch.query(), *where, *pools, *rest)


@pytest.mark.parametrize("kind", CODES)
@pytest.mark.parametrize("dtype", [*TOLERANCE, torch.float64], ids=str)
def test_kernel_writes_what_the_reference_writes(dtype, kind):
    batch = Ragged(dtype=dtype, kind=kind, shared=0, past=(0, 3, 200, 63))
    mine, other = filled(batch), filled(batch, append_ragged_reference)
    for one, two in zip(mine, other, strict=True):
        if one is not None:
            assert torch.equal(one.nan_to_num(5.0), two.nan_to_num(5.0))


def test_tokens_are_where_the_table_says_and_padding_nowhere():
    batch = Ragged()
    before, pools = batch.held_before(), filled(batch)
    key, _ = batch.new()
    starts = batch.starts.tolist()
    for row, length in enumerate(batch.lengths):
        for i in range(length):
            page, slot = divmod(batch.past[row] + i, PAGE)
            stored = pools[0][:, batch.table[row, page], slot]
            assert torch.equal(stored, key[0, :, starts[row] + i])
    changed = (pools[0].nan_to_num(9) != before[0].nan_to_num(9)).all(-1)
    assert changed.sum() == sum(batch.lengths) * batch.kv_heads


@pytest.mark.parametrize("kind", CODES)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_matrix(dtype, pattern, kind):
    sink, window = PATTERNS[pattern]
    batch = Ragged(dtype=dtype, kind=kind)
    pools = filled(batch)
    rest = (pattern, [sink], [window])
    out = attended(batch, pools, *rest)
    assert out.dtype == dtype
    assert out.is_contiguous()
    assert_close(out, batch.expected(batch.query(), pools, *rest), dtype)
    assert not out[:, :, -batch.padding :].any()


@pytest.mark.parametrize("pattern", PATTERNS)
def test_the_reference_in_float64(pattern):
    sink, window = PATTERNS[pattern]
    batch = Ragged(dtype=torch.float64, heads=6)
    pools = filled(batch)
    rest = (pattern, [sink], [window], 0.3, 5.0)
    expected = batch.expected(batch.query(), pools, *rest)
    for op in (attend, ragged_page_attention_reference):
        torch.testing.assert_close(attended(batch, pools, *rest, op=op), expected)


BATCHES = {
    "one row": Ragged((70,), (0,), padding=0),
    "no token": Ragged((0, 0), (5, 0)),
    "decodes": Ragged((1,) * 5, (0, 63, 64, 65, 700), padding=0),
    "one head a group": Ragged(heads=2, value_dim=40),
    "wide group": Ragged((1, 40), (700, 100), heads=17, kv_heads=1),
    "wider than a tile": Ragged((1, 3), (300, 10), heads=200, kv_heads=1, dim=16),
    "more rows than a tile": Ragged((500, 1, 300), (3, 900, 600), dim=16),
    "shared prefix": Ragged((5, 1, 70), (128, 140, 300), shared=2),
}


@pytest.mark.parametrize("threads", [1, 5])
@pytest.mark.parametrize("name", BATCHES)
def test_batches(name, threads):
    batch = BATCHES[name]
    pools = filled(batch)
    torch.set_num_threads(threads)
    try:
        out = attended(batch, pools, *CAUSAL)
    finally:
        torch.set_num_threads(1)
    assert_close(out, batch.expected(batch.query(), pools, *CAUSAL), torch.float32)


@pytest.mark.parametrize("pattern", ["streaming", "a-shape"])
def test_splits_of_sinks_and_windows(pattern):
    """One long decode for many threads: cuts fall into sinks and windows alike."""
    batch = Ragged((1, 7), (2900, 1500), kv_heads=1, heads=3)
    pools = filled(batch)
    rest = (pattern, [640, 64, 640], [704, 2048, 704], 0.2, 3.0)
    expected = batch.expected(batch.query(), pools, *rest)
    for threads in (3, 16):
        torch.set_num_threads(threads)
        try:
            out = attended(batch, pools, *rest)
        finally:
            torch.set_num_threads(1)
        assert_close(out, expected, torch.float32)


def test_pages_in_a_row_are_read_where_they_lie():
    batch = Ragged((300, 1), (500, 700))
    pools, table = filled(batch), batch.table
    order = table.flatten().argsort()
    straight = [None if p is None else p[:, table.flatten().long()] for p in pools]
    assert len(order) == straight[0].shape[1]
    moved = torch.arange(table.numel()).int().view(table.shape)
    where = (batch.starts, batch.before, moved)
    out = attend(batch.query(), *where, *straight, *CAUSAL)
    assert_close(out, batch.expected(batch.query(), pools, *CAUSAL), torch.float32)


def test_any_strides_of_queries_and_new_tokens():
    batch = Ragged()
    turned = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in batch.new()]
    mine, other = batch.held_before(), filled(batch)
    append(*turned, batch.starts, batch.before, batch.table, *mine)
    assert torch.equal(mine[0].nan_to_num(5), other[0].nan_to_num(5))
    query = batch.query().transpose(1, 2).contiguous().transpose(1, 2)
    where = (batch.starts, batch.before, batch.table)
    out = attend(query, *where, *other, *CAUSAL)
    assert torch.equal(out, attended(batch, other, *CAUSAL))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"starts": int32(0, 5, 5, 6, 200)}, "row 3 has tokens 6 to 200"),
        ({"starts": int32(0, 5, 4, 6, 136)}, "row 1 has tokens 5 to 4"),
        ({"past": int32(0, 3, 200, 300)}, "row 3 .* in pages for 320"),
        ({"past": int32(0, 3, 200)}, "3 rows of past"),
        ({"past": int32(0, 3, 200, 70).long()}, "not all int32"),
    ],
)
@pytest.mark.parametrize("op", [append, attend])
def test_rows_that_do_not_fit_are_refused(op, changed, message):
    batch = Ragged()
    pools = filled(batch)
    where = {"starts": batch.starts, "past": batch.before, "table": batch.table}
    where |= changed
    first = batch.new() if op is append else [batch.query()]
    rest = [] if op is append else CAUSAL
    with pytest.raises(ValueError, match=message):
        op(*first, *where.values(), *pools, *rest)


def test_heads_and_pools_that_do_not_fit_are_refused():
    batch = Ragged()
    pools = filled(batch)
    where = (batch.starts, batch.before, batch.table)
    with pytest.raises(ValueError, match="3 query heads do not share 2"):
        attend(batch.query()[:, :3], *where, *pools, *CAUSAL)
    with pytest.raises(ValueError, match=r"pages of torch.float32 for tokens of .*16"):
        attend(batch.query().half(), *where, *pools, *CAUSAL)
    with pytest.raises(ValueError, match="unknown pattern 'diagonal'"):
        attend(batch.query(), *where, *pools, "diagonal", [0], [0])
    with pytest.raises(ValueError, match=r"tokens of \(1, 2, 139, 16\) do not fit"):
        append(batch.new()[1], batch.new()[1], *where, *pools)


@pytest.mark.parametrize("kind", CODES)
def test_opcheck(kind):
    batch = Ragged(kind=kind)
    pools, where = batch.held_before(), (batch.starts, batch.before, batch.table)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(append, (*batch.new(), *where, *pools), test_utils=tests)
    arguments = (batch.query(), *where, *filled(batch), "a-shape", [5], [70], 0.2)
    torch.library.opcheck(attend, arguments, test_utils=tests)
