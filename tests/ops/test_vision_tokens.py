"""Operators on vision tokens against loops over rows, heads and windows."""

from __future__ import annotations

import math

import pytest
import torch

from graphopt.ops.tokens import (
    alike_windows,
    class_keys,
    dual_from,
    dual_scores,
    keep_passing,
    merge_windows,
    merged_away,
    text_attention,
    vision_ranks,
)
from graphopt.ops.tokens import dual_scores as scores_module

VISION = [2, 3, 4, 8, 9]  # places of vision tokens; text behind the last is asked
TOKENS = 14


def random(*sizes, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*sizes, generator=generator, dtype=torch.float64)


def tensors(batch=2):
    query, key = random(batch, 4, TOKENS, 8), random(batch, 2, TOKENS, 8, seed=1)
    vision = torch.zeros(batch, TOKENS, dtype=torch.bool)
    vision[:, VISION] = True
    return query, key, vision


def by_hand(query, key, row, vision, real, scale, softcap, window):
    """Scores of one row's vision tokens, one query and head after another."""
    heads, groups = query.shape[1], query.shape[1] // key.shape[1]
    last = max(vision)
    summed, most = dict.fromkeys(vision, 0.0), dict.fromkeys(vision, 0.0)
    for i in [i for i in real if i > last]:
        mean = dict.fromkeys(vision, 0.0)
        for head in range(heads):
            seen = [j for j in real if j <= i and (not window or j > i - window)]
            logits = [
                float(query[row, head, i] @ key[row, head // groups, j]) * scale
                for j in seen
            ]
            if softcap:
                logits = [softcap * math.tanh(x / softcap) for x in logits]
            total = sum(math.exp(x) for x in logits)
            for j, x in zip(seen, logits, strict=True):
                if j in mean:
                    mean[j] += math.exp(x) / total / heads
        for j in vision:
            summed[j] += mean[j]
            most[j] = max(most[j], mean[j])
    everything = sum(summed.values())
    return [max(summed[j] / (0.1 * everything), most[j] / 0.05) for j in vision]


@pytest.mark.parametrize(("softcap", "window"), [(0.0, 0), (5.0, 0), (0.0, 9)])
@pytest.mark.parametrize("padded", [False, True])
def test_dual_scores(softcap, window, padded):
    query, key, vision = tensors()
    mask = torch.ones_like(vision)
    mask[1, :2] = False
    mask[1, -1] = False
    vision &= mask
    scores = dual_scores(
        query, key, vision, mask if padded else None, 0.3, 0.1, 0.05, softcap, window
    )
    for row in range(2):
        real = mask[row].nonzero()[:, 0].tolist() if padded else list(range(TOKENS))
        expected = by_hand(query, key, row, VISION, real, 0.3, softcap, window)
        found = scores[row, VISION]
        torch.testing.assert_close(found, torch.tensor(expected, dtype=torch.float64))


def test_dual_scores_in_pieces(monkeypatch):
    query, key, vision = tensors()
    whole = dual_scores(query, key, vision, None, 0.3, 0.1, 0.05)
    module = __import__(scores_module.__module__, fromlist=["_CELLS"])
    monkeypatch.setattr(module, "_CELLS", 1)
    pieces = dual_scores(query, key, vision, None, 0.3, 0.1, 0.05)
    torch.testing.assert_close(pieces[vision], whole[vision])


@pytest.mark.parametrize(("softcap", "window"), [(0.0, 0), (5.0, 9)])
def test_dual_scores_of_heads_on_two_ranks(softcap, window):
    query, key, vision = tensors()
    rest, limits = (0.3, softcap, window), (0.1, 0.05)
    whole = dual_scores(query, key, vision, None, 0.3, *limits, softcap, window)
    halves = zip(query.chunk(2, 1), key.chunk(2, 1), strict=True)
    parts = [text_attention(q, k, vision, None, *rest) for q, k in halves]
    scores = dual_from(sum(parts) / 2, vision, *limits)
    torch.testing.assert_close(scores[vision], whole[vision])
    args = (query.float(), key.float(), vision, None, *rest)
    torch.library.opcheck(torch.ops.graphopt.text_attention.default, args)
    vision[0, -1] = True  # an image at the end
    vision[1] = False  # no image
    paid = text_attention(query, key, vision, None, *rest)
    assert dual_from(paid, vision, *limits).isinf().all()


def test_rows_without_text_behind_images_keep_all():
    query, key, vision = tensors()
    vision[0, -1] = True  # an image at the end
    vision[1] = False  # no image
    scores = dual_scores(query, key, vision, None, 0.3, 0.1, 0.05)
    assert scores.isinf().all()


def test_a_threshold_of_zero_keeps_all():
    query, key, vision = tensors()
    assert dual_scores(query, key, vision, None, 0.3, 0.1, 0.0).isinf().all()


def test_dual_scores_as_an_operator():
    query, key, vision = tensors()
    args = (query.float(), key.float(), vision, None, 0.3, 0.1, 0.05, 0.0, 0)
    torch.library.opcheck(torch.ops.graphopt.dual_scores.default, args)


def test_ranks_put_text_before_the_key_set_before_the_rest():
    vision = torch.tensor([[False, True, True, True, False, False]])
    protected = torch.tensor([[False, False, True, False, True, False]])
    scores = torch.tensor([[0.0, float("inf"), 0.5, 0.7, 0.1, 0.0]])
    ranks = vision_ranks(scores, vision, protected, None, 4)[0]
    assert ranks[[0, 4, 5]].isinf().all()
    order = ranks[[3, 1, 2]]  # scores, of any size, and then the key set
    assert order.diff().gt(0).all()
    assert order.isfinite().all()
    with pytest.raises(RuntimeError, match="fewer vision tokens"):
        vision_ranks(scores, vision, protected, None, 2)


def test_equal_distances_among_vision_tokens():
    vision = torch.zeros(1, 12, dtype=torch.bool)
    vision[0, 2:10] = True
    ranks = vision_ranks(torch.zeros(1, 12), vision, None, None, 8, True)[0]
    assert ranks[2:10].tolist() == [0, 1, 0, 1, 0, 1, 0, 1]


def test_as_many_stay_as_pass_where_most_do():
    ranks = torch.tensor([[0.9, 2.0, 0.1, 3.0, 9.0], [9.0, 0.5, 0.1, 0.2, 9.0]])
    mask = torch.tensor([[True] * 5, [False, True, True, True, True]])
    assert keep_passing(ranks, 1.0, mask).tolist() == [[1, 3, 4], [1, 3, 4]]
    assert keep_passing(ranks, 1.0, None).tolist() == [[1, 3, 4], [0, 1, 4]]
    assert keep_passing(ranks, 99.0, mask).tolist() == [[3, 4], [1, 4]]


def test_a_last_token_of_an_image_stays():
    vision = torch.tensor([[False, True, True, True], [True, True, True, False]])
    mask = torch.tensor([[True] * 4, [True, True, True, False]])
    ranks = vision_ranks(torch.zeros(2, 4), vision, None, mask, 2)
    assert ranks.isinf().tolist() == [
        [True, False, False, True],
        [False] * 2 + [True, False],
    ]
    assert 0 < ranks[1, 3] < torch.inf  # padding goes after what scores little


def test_class_keys():
    query, key = random(2, 4, 10, 8), random(2, 2, 10, 8, seed=1)
    gone = torch.zeros(2, 9, dtype=torch.bool)
    for images in (gone, gone.index_fill(1, torch.arange(4), True)):
        found = class_keys(query, key, images, 0.3, 3)
        for row in range(2):
            paid = torch.zeros(10, dtype=torch.float64)
            for head in range(4):
                logits = query[row, head, 0] @ key[row, head // 2].T * 0.3
                paid += logits.softmax(-1)
            best = sorted(range(9), key=lambda i: (bool(images[row, i]), -paid[i + 1]))
            assert sorted(best[:3]) == found[row].nonzero()[:, 0].tolist()


def test_windows():
    """A grid of 7 x 8 has four windows; its last row and columns are in none."""
    x = random(3, 56, 5)
    for corner in (0, 3, 24):  # windows 0 and 1 of the first row; 2 of the second
        cells = [corner + 8 * i + j for i in range(3) for j in range(3)]
        x[0, cells] = x[0, corner] + 0.1 * x[0, cells]
    assert alike_windows(x, 7, 8, 3, -2.0)[0].tolist() == [True, True, True, False]
    assert alike_windows(x, 7, 8, 4, 0.8)[0].tolist() == [False] * 4  # others: none
    chosen = alike_windows(x[:1], 7, 8, 4, 0.8)
    assert chosen.tolist() == [[True, True, True, False]]
    away = merged_away(chosen, 7, 8)[0].nonzero()[:, 0].tolist()
    cells = [3 + 8 * i + j for i in range(3) for j in range(3)]
    assert set(cells) - set(away) == {12}
    assert len(away) == 24
    merged = merge_windows(x[:1], chosen, 7, 8)
    torch.testing.assert_close(merged[0, 12], x[0, cells].mean(0))
    assert torch.equal(merged[0, 36], x[0, 36])  # the middle of the fourth window
