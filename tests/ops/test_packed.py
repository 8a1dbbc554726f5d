"""Packing of prompts, and attention over packed prompts, against float64."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from graphopt.ops.packed import packed_attention, packed_reference
from graphopt.ops.tokens import pack_prompts, take_packed, unpack_tokens
from tests.oracle import assert_close, oracle, tensors, visible

LENGTHS = [1, 70, 33, 2, 70]
TOKENS = 70


def mask_of(side, lengths=LENGTHS, tokens=TOKENS):
    place = torch.arange(tokens)
    rows = [place >= tokens - n if side == "left" else place < n for n in lengths]
    mask = torch.stack(rows)
    if side == "holes":
        mask[1, 10:14] = mask[2, 5] = False
    return mask


@pytest.mark.parametrize("bins", [False, True])
@pytest.mark.parametrize("side", ["left", "right", "holes"])
def test_tokens_come_back(side, bins):
    mask = mask_of(side)
    places, starts, lengths, slots = pack_prompts(mask, bins)
    assert starts.dtype == lengths.dtype == torch.int32
    assert lengths.tolist() == LENGTHS
    ends = sorted(zip(starts.tolist(), (starts + lengths).tolist(), strict=True))
    assert all(a[1] <= b[0] for a, b in pairwise(ends))
    x = torch.randn(5, 3, TOKENS, 2)
    packed = take_packed(x, places, 2)
    assert packed.shape == (5, 3, places.shape[1], 2)
    back = unpack_tokens(packed, slots, 2).transpose(1, 2)
    spans = slots >= 0
    assert torch.equal(back[spans], x.transpose(1, 2)[spans])
    assert not back[~spans].any()
    assert spans[mask].all()


def test_rows_without_gaps_are_as_short_as_they_can_be():
    places, starts, *_ = pack_prompts(mask_of("right"))
    assert places.shape == (5, -(-sum(LENGTHS) // 5))
    assert starts.tolist() == [0, 1, 71, 104, 106]


def test_bins_are_filled_best_fit_decreasing():
    lengths = [4, 8, 1, 4, 2, 1, 10]
    _, starts, _, _ = pack_prompts(mask_of("right", lengths, 12), bins=True)
    # Bins of 10: [10], [8, 2], [4, 4, 1, 1]: the 2 goes to the fullest that has room.
    assert starts.tolist() == [20, 10, 28, 24, 18, 29, 0]


def test_room_for_bins_fixes_the_width():
    mask = mask_of("left", [3, 5, 2], 8)
    assert pack_prompts(mask, True, 2)[0].shape == (3, -(-2 * 8 // 3))
    with pytest.raises(ValueError, match=r"need 3 bins of 8 tokens, and bins = 2"):
        pack_prompts(mask_of("left", [7, 8, 6], 8), True, 2)


def test_a_row_of_padding_is_named():
    mask = mask_of("left", [3, 0, 2], 8)
    with pytest.raises(ValueError, match="row 1 of the attention mask is all padding"):
        pack_prompts(mask)


def case(side="left", dtype=torch.float32, heads=(4, 2), dims=(16, 8), bins=False):
    mask = mask_of(side)
    places, *where = pack_prompts(mask, bins)
    q, k, v = tensors(*heads, TOKENS, TOKENS, dims[0], dtype, batch=5)
    v = torch.randn(*v.shape[:3], dims[1]).to(dtype)
    packed = [take_packed(x, places, 2) for x in (q, k, v)]
    return (q, k, v, mask), (*packed, *where, take_packed(mask, places, 1))


@pytest.mark.parametrize(
    ("side", "pattern", "window", "softcap", "dtype", "bins"),
    [
        ("left", "causal", 0, 0.0, torch.float32, False),
        ("right", "causal", 0, 4.0, torch.float32, True),
        ("holes", "causal", 0, 0.0, torch.bfloat16, False),
        ("holes", "sliding-window", 9, 0.0, torch.float32, False),
        ("left", "sliding-window", 7, 0.0, torch.float16, True),
        ("holes", "full", 0, 0.0, torch.float32, False),
        ("right", "full", 0, 0.0, torch.float64, False),
    ],
)
def test_prompts_attend_to_themselves(side, pattern, window, softcap, dtype, bins):
    (q, k, v, mask), packed = case(side, dtype, bins=bins)
    out = packed_attention(*packed, pattern, [0], [window], 0.3, softcap)
    assert out.dtype == dtype
    assert out.transpose(1, 2).is_contiguous()
    slots = packed[5]
    seen = visible(pattern, 0, window, TOKENS, TOKENS, 0) & mask[:, None, None]
    expected = oracle(q, k, v, seen, 0.3, softcap).transpose(1, 2)[mask]
    actual = unpack_tokens(out, slots, 2).transpose(1, 2)[mask]
    assert_close(actual, expected, torch.float32 if dtype == torch.float64 else dtype)
    used = torch.zeros(out.shape[0] * out.shape[2], dtype=torch.bool)
    used[slots[slots >= 0]] = True
    assert not out.transpose(1, 2).flatten(0, 1)[~used].any()


def test_gradients_are_the_references():
    _, packed = case()
    inputs = [x.double().requires_grad_() for x in packed[:3]]
    args = (*packed[3:], "causal", [0], [0])
    weight = torch.randn(5, 4, packed[0].shape[2], 8, dtype=torch.float64)
    grads = [
        torch.autograd.grad((run(*inputs, *args) * weight).sum(), inputs)
        for run in (packed_attention, packed_reference)
    ]
    for actual, expected in zip(*grads, strict=True):
        torch.testing.assert_close(actual, expected)


def test_operators_are_registered_rightly():
    _, packed = case()
    args = (*packed, "sliding-window", [0], [5], 0.25, 0.0)
    torch.library.opcheck(torch.ops.graphopt.packed_attention.default, args)
