"""Operators on tokens at places: pages written, scored and attended to in any order."""

from __future__ import annotations

import pytest
import torch

from graphopt.ops.pages import (
    PAGE,
    append_reference,
    place_attention,
    place_scores,
    write_tokens,
)
from graphopt.ops.reference import masked_attention
from graphopt.ops.tokens import WHOLE, keep_tokens, token_scores
from graphopt.ops.tokens.returning import keep_places, leave_states, missing_places
from graphopt.runtime.pool import Pool
from graphopt.runtime.rows import home

B, HQ, HKV, D, DV, TOKENS = 2, 4, 2, 16, 24, 150
KINDS = ["", "int8", "int4"]


def tokens(heads=HKV, count=TOKENS, dim=D):
    return torch.randn(B, heads, count, dim)


def pool_of(key, value, kind="", order=None):
    """A pool and its table with the tokens written at their places in ``order``."""
    pages = -(-TOKENS // PAGE)
    pool = Pool.like(HKV, B * pages, key, value, kind)
    for tensor in pool.tensors():
        if tensor is not None:  # what nobody wrote may be anything
            tensor.fill_(float("nan") if tensor.is_floating_point() else 7)
    table = home(B, pages, key.device).flip(1)
    for places in order if order is not None else [torch.arange(TOKENS).expand(B, -1)]:
        rows = [x.take_along_dim(places[:, None, :, None], 2) for x in (key, value)]
        write_tokens(*rows, places, table, *pool.tensors())
    return pool, table


@pytest.mark.parametrize("kind", KINDS)
def test_places_in_any_order_are_what_appending_writes(kind):
    torch.manual_seed(0)
    key, value = tokens(), tokens(dim=DV)
    shuffled = torch.stack([torch.randperm(TOKENS) for _ in range(B)]).split(37, 1)
    found, table = pool_of(key, value, kind, shuffled)
    wanted, _ = pool_of(key, value, kind, [])
    past = torch.zeros(B, dtype=torch.int32)
    append_reference(key, value, past, table, *wanted.tensors(), None)
    for one, other in zip(found.tensors(), wanted.tensors(), strict=True):
        if one is not None:
            assert torch.equal(one.nan_to_num(), other.nan_to_num())


def seen_of(count):
    """Places of each row, ascending; the second row has three fewer."""
    seen = torch.stack([torch.randperm(TOKENS)[:count].sort().values for _ in range(B)])
    seen[1, -3:] = -1
    return seen


@pytest.mark.parametrize("softcap", [0.0, 3.0])
def test_attention_to_places_is_masked_attention(softcap):
    torch.manual_seed(1)
    key, value, seen = tokens(), tokens(dim=DV), seen_of(40)
    places = torch.stack([row[row >= 0][-5:] for row in seen])
    query = tokens(HQ, 5)
    # Only what is seen is written: the rest of the pool is NaN.
    pool, table = pool_of(key, value, order=[seen.where(seen >= 0, seen.amax(1, True))])
    k, v, *scales = pool.tensors()
    found = place_attention(query, places, seen, table, k, v, *scales, 0.3, softcap)
    mask = torch.zeros(B, TOKENS, dtype=torch.bool)
    for row, of in zip(mask, seen, strict=True):
        row[of[of >= 0]] = True
    mask = mask[:, None] & (torch.arange(TOKENS) <= places[..., None])
    args = (query.double(), key.double(), value.double(), None, mask[:, None])
    torch.testing.assert_close(
        found.double(), masked_attention(*args, 0.3, softcap), rtol=1e-4, atol=1e-5
    )


def test_scores_of_places_are_scores_of_those_tokens():
    torch.manual_seed(2)
    key, seen, query = tokens(), seen_of(40), tokens(HQ, 40)
    pool, table = pool_of(key, key)
    found = place_scores(query, seen, table, pool.keys, None, 0.2, 2.0)
    assert found[1, -3:].eq(0).all()
    for row, places, one, q in zip(found, seen, key, query, strict=True):
        real = places[places >= 0]
        keys, rows = one[None, :, real], q[None, :, -len(real) :]
        wanted = token_scores(rows, keys, None, 0.2, 2.0)[0]
        torch.testing.assert_close(row[: len(real)], wanted)


def test_the_best_places_stay_as_the_best_tokens_do():
    torch.manual_seed(3)
    seen, scores = seen_of(40), torch.rand(B, 40).round(decimals=1)  # with equals
    for count in (1, 7, 38, 40):
        found = keep_places(scores, seen, count)
        kept = keep_tokens(scores, count, seen >= 0)
        for row, places, where in zip(found, seen, kept, strict=True):
            wanted = [p for p in places[where].tolist() if p >= 0]
            assert row.tolist() == wanted + [-1] * (count - len(wanted))


def test_what_was_left_is_missing_where_it_was_left():
    stream, places = torch.randn(2, 4, 8), torch.tensor([[0, 2, 5, 6], [1, 3, 4, 6]])
    states, depth = torch.zeros(2, 9, 8), torch.full((2, 9), WHOLE, dtype=torch.int32)
    kept = torch.tensor([[1, 3], [0, 3]])
    leave_states(stream, places, kept, states, depth, 0)
    leave_states(stream[:, :1], torch.tensor([[8], [8]]), None, states, depth, 1)
    assert depth.tolist() == [
        [0, -1, -1, -1, -1, 0, -1, -1, 1],
        [-1, -1, -1, 0, 0, -1, -1, -1, 1],
    ]
    assert torch.equal(states[1, 3], stream[1, 1])
    seen = torch.tensor([[0, 2, 5, 8], [2, 4, 8, -1]])
    depth[:, 8] = 0  # the newest is always among them
    assert missing_places(seen, depth, 0).tolist() == [[0, 5, 8], [4, 8, 8]]
    depth[:, :8] = WHOLE
    assert missing_places(seen, depth, 0).tolist() == [[8, 8], [8, 8]]
