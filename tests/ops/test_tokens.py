"""The operators on tokens against what they say, row by row."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.ops.tokens import (
    keep_tokens,
    pool_places,
    pool_tokens,
    smooth_scores,
    spread_scores,
    take_tokens,
    token_scores,
)
from tests.oracle import tensors

MASKS = {
    "none": None,
    "left": [[0, 0, 1, 1, 1, 1, 1], [1] * 7],
    "right": [[1, 1, 1, 1, 0, 0, 0], [1] * 7],
    "holes": [[1, 0, 1, 1, 0, 1, 0], [0, 1, 1, 0, 1, 1, 1]],
}


def mask_of(name):
    rows = MASKS[name]
    return None if rows is None else torch.tensor(rows, dtype=torch.bool)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("observe", [1, 3, 9])
@pytest.mark.parametrize(("softcap", "window"), [(0.0, 0), (3.0, 0), (0.0, 3)])
def test_scores_are_the_last_tokens_attention(name, softcap, window, observe):
    q, k, _ = tensors(6, 2, 7, 7, 16, batch=2)
    mask = mask_of(name)
    actual = token_scores(q, k, mask, 0.3, softcap, window, observe)
    for b in range(2):
        real = [i for i in range(7) if mask is None or mask[b, i]]
        rows = [i for i in real if i > real[-1] - observe]
        expected = torch.zeros(7, dtype=torch.float64)
        for row, h in itertools.product(rows, range(6)):
            seen = [i for i in real if i <= row and (not window or i > row - window)]
            logits = (k[b, h // 3, seen].double() @ q[b, h, row].double()) * 0.3
            if softcap:
                logits = softcap * torch.tanh(logits / softcap)
            expected[seen] += logits.softmax(0) / 6 / len(rows)
        torch.testing.assert_close(actual[b].double(), expected, atol=1e-6, rtol=1e-5)


def test_smoothed_scores_are_the_greatest_of_neighbours():
    scores = torch.rand(2, 11)
    for width in (1, 3, 7):
        half = width // 2
        for row, found in zip(scores, smooth_scores(scores, width), strict=True):
            wanted = [row[max(0, i - half) : i + half + 1].max() for i in range(11)]
            assert torch.equal(found, torch.stack(wanted))


def kept_by_hand(scores, count, real, last):
    order = sorted(real, key=lambda i: (i != last, -scores[i], i))
    padding = [i for i in range(len(scores)) if i not in real]
    return sorted((order + padding)[:count])


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_kept_are_the_last_and_the_best(data):
    tokens = data.draw(st.integers(1, 12))
    count = data.draw(st.integers(1, tokens))
    # Few values: ties must go to the earlier token.
    value = st.sampled_from([0.0, 0.25, 0.5])
    rows = [data.draw(st.lists(value, min_size=tokens, max_size=tokens)) for _ in "ab"]
    masks = [
        data.draw(st.lists(st.booleans(), min_size=tokens, max_size=tokens).filter(any))
        for _ in "ab"
    ]
    actual = keep_tokens(torch.tensor(rows), count, torch.tensor(masks))
    for row, mask, kept in zip(rows, masks, actual.tolist(), strict=True):
        real = [i for i in range(tokens) if mask[i]]
        assert kept == kept_by_hand(row, count, real, real[-1])


@pytest.mark.parametrize("name", MASKS)
def test_even_keeps_equal_distances(name):
    mask = mask_of(name)
    kept = keep_tokens(torch.rand(2, 7), 3, mask, even=True)
    for b in range(2):
        real = [i for i in range(7) if mask is None or mask[b, i]]
        n = len(real)
        steps = [i for i in range(n) if (i + 1) * 3 // n > i * 3 // n]
        assert kept[b].tolist() == [real[i] for i in steps]
        assert real[-1] in kept[b]


def test_take():
    x, kept = torch.randn(2, 3, 7, 5), torch.tensor([[0, 2, 6], [1, 2, 3]])
    actual = take_tokens(x, kept, 2)
    for b in range(2):
        assert torch.equal(actual[b], x[b, :, kept[b]])
    shared = take_tokens(x[:1], kept, 2)
    assert torch.equal(shared[1], x[0, :, kept[1]])


def pooled_by_hand(x, count, real):
    """The runs' ends and means of one row x [S, H], padding behind the real tokens."""
    first, *inner, last = real if len(real) > 1 else [None, *real]
    runs = [] if first is None or count < 2 else [[first]]
    wanted = min(count - 2, len(inner))
    for i in range(wanted):
        ends = (math.ceil(j * len(inner) / wanted) for j in (i, i + 1))
        runs.append(inner[slice(*ends)])
    return [run[-1] for run in runs] + [last], [x[run].mean(0) for run in runs] + [
        x[last]
    ]


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("count", range(1, 8))
def test_pool_averages_runs_of_neighbours(name, count):
    x, mask = torch.randn(2, 7, 5, dtype=torch.float64), mask_of(name)
    kept = pool_places(x, count, mask)
    actual = pool_tokens(x, kept, mask)
    for b in range(2):
        real = [i for i in range(7) if mask is None or mask[b, i]]
        ends, means = pooled_by_hand(x[b], count, real)
        padding = [i for i in range(7) if i not in real][: count - len(ends)]
        wanted = dict(zip(ends, means, strict=True)) | {i: x[b, i] for i in padding}
        assert kept[b].tolist() == sorted(wanted)
        expected = torch.stack([wanted[i] for i in sorted(wanted)])
        torch.testing.assert_close(actual[b], expected)


def test_pool_of_everything_is_exact():
    x, mask = torch.randn(2, 7, 5), mask_of("holes")
    assert torch.equal(pool_tokens(x, pool_places(x, 7, mask), mask), x)


def test_spread_scores_are_even_and_repeat():
    x = torch.randn(2, 4096, 1)
    first, other = spread_scores(x, 0), spread_scores(x, 1)
    assert torch.equal(first, spread_scores(x, 0))
    assert torch.equal(first[0], first[1])
    counts = torch.histc(first[0], 8, 0, 1)
    assert (counts - 512).abs().max() < 6 * math.sqrt(512)
    assert abs(float(torch.corrcoef(torch.stack((first[0], other[0])))[0, 1])) < 0.05


@pytest.mark.parametrize(
    "name",
    ["token_scores", "keep_tokens", "take_tokens", "pool_places", "pool_tokens"],
)
def test_are_operators(name):
    q, k, _ = tensors(6, 2, 7, 7, 16, batch=2)
    mask = mask_of("left")
    scores, x = token_scores(q, k, mask, 0.3), torch.randn(2, 7, 5)
    args = {
        "token_scores": (q, k, mask, 0.3),
        "keep_tokens": (scores, 4, mask),
        "take_tokens": (q, keep_tokens(scores, 4, mask), 2),
        "pool_places": (x, 4, mask),
        "pool_tokens": (x, pool_places(x, 4, mask), mask),
    }[name]
    op = getattr(torch.ops.graphopt, name).default
    assert set(torch.library.opcheck(op, args).values()) == {"SUCCESS"}
