"""Visited pairs, counted by blocks, against masks written out."""

from __future__ import annotations

import pytest
import torch

from graphopt.ops import (
    attention_reference,
    select_blocks,
    select_vertical_slash,
    visit_attention,
)
from graphopt.search.density import list_share, visited_share


def tensors(tokens, heads=4, kv_heads=2):
    torch.manual_seed(tokens)
    shape = (1, kv_heads, tokens, 16)
    return torch.randn(1, heads, tokens, 16), torch.randn(shape), torch.randn(shape)


def causal_share(mask):
    tokens = mask.shape[-1]
    return float(mask.sum()) / mask[..., 0, 0].numel() / (tokens * (tokens + 1) / 2)


@pytest.mark.parametrize("tokens", [64, 200, 515])
@pytest.mark.parametrize("dense_rows", [(0,), (0, 100, 0, 3)])
def test_lists_count_as_their_masks_do(tokens, dense_rows):
    q, k, _ = tensors(tokens)
    lists = select_vertical_slash(q, k, None, [4, 0, 9, 30], [20], [7], [5, 0, 90, 3])
    mask = lists.visited(dense_rows, tokens, tokens, 0)
    assert list_share(lists, dense_rows, tokens) == pytest.approx(causal_share(mask))


@pytest.mark.parametrize("tokens", [200, 515])
@pytest.mark.parametrize("stride", [0, 8])
def test_block_lists_count_as_their_masks_do(tokens, stride):
    q, k, v = tensors(tokens)
    lists = select_vertical_slash(q, k, None, [4], [20], [7], [5])
    tables = ([2, 0, 3, 0], [0, 0, 0, stride], [1.0, 1.0, 1.0, 0.5])
    blocks = select_blocks(q, k, None, *tables, 64)
    for dense_rows in ([0], [0, 70, 3, 0]):
        mask = lists.visited(dense_rows, tokens, tokens, 0, blocks)
        rest = (dense_rows, 0, None, 0.0, 0, *blocks)
        arguments = (q, k, v, None, *lists, *rest)
        share = visited_share("graphopt.visit_attention", arguments)
        assert share == pytest.approx(causal_share(mask))


@pytest.mark.parametrize(
    ("pattern", "sink", "window"),
    [
        ("a-shape", [4], [60]),
        ("sliding-window", [0], [40]),
        ("streaming", [64, 0, 64, 64], [128, 2**31 - 64, 64, 128]),
        ("causal", [0], [0]),
    ],
)
def test_static_patterns_count_as_the_reference_sees(pattern, sink, window):
    tokens = 300
    q, k, _ = tensors(tokens)
    # With values that are the keys' own places, weights above zero are what is seen.
    places = torch.eye(tokens).expand(1, 2, -1, -1)
    table = (pattern, sink, window, 0, 0.01, 0.0)
    weights = attention_reference(q, k, places, None, *table)
    arguments = (q, k, places, None, *table[:4])
    share = visited_share("graphopt.attention", arguments)
    assert share == pytest.approx(causal_share(weights > 0))


def test_below_min_tokens_everything_is_visited():
    q, k, v = tensors(100)
    lists = select_vertical_slash(q, k, None, [4], [8], [0], [0])
    rest = ([0], 0, None, 0.0)
    visit = (q, k, v, None, *lists, *rest)
    assert visited_share("graphopt.visit_attention", (*visit, 200)) == 1.0
    assert visited_share("graphopt.visit_attention", (*visit, 100)) < 0.9
    static = (q, k, v, None, "a-shape", [4], [8], 0, None, 0.0)
    assert visited_share("graphopt.attention", (*static, 200)) == 1.0
    assert visit_attention(q, k, v, None, lists).shape == q.shape


def test_a_call_on_a_cache_is_no_prefill():
    q, k, v = tensors(100)
    arguments = (q[:, :, :1], k, v, None, "a-shape", [4], [8], 0)
    with pytest.raises(ValueError, match="1 queries and 100 keys"):
        visited_share("graphopt.attention", arguments)
