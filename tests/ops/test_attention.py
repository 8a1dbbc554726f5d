"""``graphopt::attention`` on the CPU against a float64 oracle with a boolean mask."""

from __future__ import annotations

import itertools

import pytest
import torch

from graphopt.ops import attention, attention_reference
from tests.oracle import TOLERANCE, assert_close, oracle, tensors, visible

PATTERNS = {
    "causal": (0, 0),
    "sliding-window": (0, 40),
    "a-shape": (5, 70),
    "streaming": (64, 128),
}
LENGTHS = (1, 17, 63, 64, 65, 1000)


DTYPES = list(TOLERANCE)
# Every pair of values: the dtype goes by the sum of the other two's places.
MATRIX = [
    (dim, group, DTYPES[(i + j) % len(DTYPES)])
    for i, dim in enumerate((64, 80, 96, 128, 256))
    for j, group in enumerate((1, 3, 4, 8))
]


@pytest.mark.parametrize(("dim", "group", "dtype"), MATRIX, ids=str)
def test_matrix(dim, group, dtype):
    for length, (pattern, (sink, window)) in itertools.product(
        LENGTHS, PATTERNS.items()
    ):
        q, k, v = tensors(group, 1, length, length, dim, dtype)
        actual = attention(q, k, v, None, pattern, [sink], [window], 0)
        mask = visible(pattern, sink, window, length, length, 0)
        assert actual.dtype == dtype
        assert actual.is_contiguous()
        assert_close(actual, oracle(q, k, v, mask, dim**-0.5), dtype)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_padding_offset_and_softcap(pattern):
    sink, window = PATTERNS[pattern]
    q, k, v = tensors(4, 2, 50, 150, 64, batch=3)
    key_mask = torch.rand(3, 150) < 0.7
    actual = attention(q, k, v, key_mask, pattern, [sink], [window], 100, 0.2, 5.0)
    mask = visible(pattern, sink, window, 50, 150, 100) & key_mask[:, None, None]
    assert_close(actual, oracle(q, k, v, mask, 0.2, 5.0), torch.float32)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_rows_without_a_key_give_zeros(pattern):
    sink, window = PATTERNS[pattern]
    q, k, v = tensors(2, 1, 70, 70, 64, batch=2)
    key_mask = torch.ones(2, 70, dtype=torch.bool)
    key_mask[0, :33] = False
    key_mask[1] = False
    actual = attention(q, k, v, key_mask, pattern, [sink], [window], 0)
    mask = visible(pattern, sink, window, 70, 70, 0) & key_mask[:, None, None]
    assert not actual[0, :, :33].any()
    assert not actual[1].any()
    assert_close(actual, oracle(q, k, v, mask, 64**-0.5), torch.float32)


def test_heads_of_their_own_pattern():
    q, k, v = tensors(4, 2, 300, 300, 64)
    sinks, windows = [0, 10, 64, 200], [32, 100, 1, 2**31 - 1]
    actual = attention(q, k, v, None, "a-shape", sinks, windows, 0)
    masks = [
        visible("a-shape", *p, 300, 300, 0) for p in zip(sinks, windows, strict=True)
    ]
    assert_close(actual, oracle(q, k, v, torch.stack(masks), 64**-0.5), torch.float32)


@pytest.mark.parametrize("pattern", PATTERNS)
def test_inputs_of_any_strides(pattern):
    sink, window = PATTERNS[pattern]
    q, k, v = tensors(4, 2, 130, 130, 64)
    turned = [t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k, v)]
    wide = [torch.randn(*t.shape[:-1], 2 * t.shape[-1]) for t in (q, k, v)]
    for w, t in zip(wide, (q, k, v), strict=True):
        w[..., ::2] = t
    expected = attention(q, k, v, None, pattern, [sink], [window], 0)
    for views in (turned, [w[..., ::2] for w in wide]):
        assert not views[0].is_contiguous()
        actual = attention(*views, None, pattern, [sink], [window], 0)
        torch.testing.assert_close(actual, expected)


def test_a_window_over_everything_is_dense_bit_for_bit_below_min_tokens():
    q, k, v = tensors(6, 2, 200, 200, 64)
    dense = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, is_causal=True, enable_gqa=True
    )
    actual = attention(q, k, v, None, "a-shape", [4], [8], 0, min_tokens=201)
    assert torch.equal(actual, dense)


@pytest.mark.parametrize("pattern", [*PATTERNS, "full"])
def test_reference_agrees_with_the_oracle(pattern):
    sink, window = PATTERNS.get(pattern, (0, 0))
    q, k, v = tensors(6, 2, 90, 150, 32, batch=2)
    key_mask = torch.rand(2, 150) < 0.5
    actual = attention_reference(
        q, k, v, key_mask, pattern, [sink], [window], 60, 0.3, 2.0
    )
    mask = visible(pattern, sink, window, 90, 150, 60) & key_mask[:, None, None]
    assert_close(actual, oracle(q, k, v, mask, 0.3, 2.0), torch.float32)


def test_opcheck():
    q, k, v = (t.requires_grad_() for t in tensors(4, 2, 33, 33, 16))
    arguments = (q, k, v, None, "a-shape", [2], [9], 0)
    torch.library.opcheck(torch.ops.graphopt.attention.default, arguments)


def test_backward_equals_that_of_sdpa():
    q, k, v = (t.double().requires_grad_() for t in tensors(4, 2, 40, 40, 16))
    mask = visible("a-shape", 3, 8, 40, 40, 0)
    grad = torch.randn(1, 4, 40, 16, dtype=torch.double)
    actual = torch.autograd.grad(
        attention(q, k, v, None, "a-shape", [3], [8], 0), (q, k, v), grad
    )
    dense = torch.nn.functional.scaled_dot_product_attention(
        q, k, v, mask, enable_gqa=True
    )
    expected = torch.autograd.grad(dense, (q, k, v), grad)
    torch.testing.assert_close(actual, expected, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pattern": "diagonal"}, "unknown pattern"),
        ({"sink": [1, 2]}, "table of 2 values"),
        ({"key": torch.randn(1, 3, 8, 16)}, "do not share"),
        ({"key": torch.randn(1, 2, 8, 8)}, "head_dim"),
    ],
)
def test_bad_arguments(change, message):
    q, k, v = tensors(4, 2, 8, 8, 16)
    given = {"query": q, "key": k, "value": v, "key_mask": None, "pattern": "causal"}
    given |= {"sink": [0], "window": [0], "query_offset": 0, **change}
    with pytest.raises(ValueError, match=message):
        attention(**given)
