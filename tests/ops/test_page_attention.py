"""``graphopt::page_attention``: which pages are chosen, and attention over them."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.ops.pages import LOGICAL, PAGE, append_reference, page_attention_reference
from tests.ops.pages import CODES, Layer
from tests.oracle import TOLERANCE, assert_close, oracle

append = torch.ops.graphopt.append_pages
attend = torch.ops.graphopt.page_attention
GROUP = 2


def query_of(layer, seed=0):
    generator = torch.Generator().manual_seed(100 + seed)
    shape = (layer.batch, layer.heads * GROUP, 1, layer.dim)
    return torch.randn(shape, generator=generator).to(layer.dtype)


def chosen_by_hand(query, keys, visible, budget):
    """The pages of one head of one row, in plain Python over its tokens."""
    total = keys.shape[0]
    pages = range(math.ceil(total / PAGE))
    some = [p for p in pages if visible[p * PAGE : (p + 1) * PAGE].any()]
    forced = {some[0], pages[-1]} & set(some)

    def score(page):
        best = -math.inf
        for first in range(page * PAGE, min((page + 1) * PAGE, total), LOGICAL):
            part = keys[first : first + LOGICAL].double()
            low, high = part.amin(0), part.amax(0)
            for q in query.double():
                best = max(best, torch.maximum(q * low, q * high).sum().item())
        return best

    rest = sorted((p for p in some if p not in forced), key=score, reverse=True)
    return sorted([*forced, *rest[: budget - len(forced)]])


def expected(layer, query, key_mask, budget):
    """Chosen pages and attention in float64 through their boolean mask."""
    keys, values = layer.all_keys()
    total = keys.shape[2]
    mask = torch.zeros(layer.batch, layer.heads * GROUP, 1, total, dtype=torch.bool)
    chosen = {}
    for row in range(layer.batch):
        visible = (
            torch.ones(total).bool() if key_mask is None else key_mask[row, :total]
        )
        for head in range(layer.heads):
            rows = slice(head * GROUP, (head + 1) * GROUP)
            if head in layer.rings:
                newest = (total - 1) // PAGE
                pages = range(newest + 1)
                pages = [
                    p
                    for p in pages
                    if p < layer.sink_pages or p > newest - layer.ring_pages
                ]
            else:
                own = query[row, rows, 0]
                pages = chosen_by_hand(own, keys[row, head], visible, budget)
                chosen[row, head] = pages
                pages = {*pages, (total - 1) // PAGE}
            for page in pages:
                mask[row, rows, 0, page * PAGE : (page + 1) * PAGE] = True
            mask[row, rows, 0] &= visible
    return chosen, oracle(query, keys, values, mask, layer.dim**-0.5)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("rings", [(), (1,), (0, 2)])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_attends_to_the_pages_chosen_by_hand(dtype, rings, masked):
    layer = Layer(dtype=dtype, rings=rings)
    layer.append(500, append)
    layer.append(1, append, seed=1)
    query = query_of(layer)
    key_mask = None
    if masked:
        key_mask = torch.rand(layer.batch, 501) > 0.3
        key_mask[0, :150] = False  # left padding, two pages of it whole
        key_mask[1, -1] = True
    out = attend(query, *layer.held(), *layer.state(), key_mask, 4, 1)
    chosen, result = expected(layer, query, key_mask, 4)
    for (row, head), pages in chosen.items():
        place = layer.full_heads.index(head)
        assert layer.selected[row, place].tolist() == pages + [-1] * (9 - len(pages))
    assert_close(out, result, dtype)


@pytest.mark.parametrize("kind", CODES)
@pytest.mark.parametrize("dtype", [*TOLERANCE, torch.float64], ids=str)
def test_kernel_agrees_with_the_reference_over_many_steps(dtype, kind):
    ours, theirs = (Layer(dtype=dtype, kind=kind, rings=(1,)) for _ in range(2))
    mask = torch.rand(2, 9 * PAGE) > 0.2
    limit = TOLERANCE.get(dtype, 1e-9)
    for step, new in enumerate((300, 1, 1, 1, 1, 90, 1, 1)):
        ours.append(new, append, step)
        theirs.append(new, append_reference, step)
        if new > 1:
            continue
        query = query_of(ours, step)
        rest = (mask, 4, 3, None, 0.0)
        mine = attend(query, *ours.held(), *ours.state(), *rest)
        other = page_attention_reference(query, *theirs.held(), *theirs.state(), *rest)
        torch.testing.assert_close(mine, other, atol=limit, rtol=limit)
        assert torch.equal(ours.selected, theirs.selected)
        assert torch.equal(ours.selected_at, theirs.selected_at)


@pytest.mark.parametrize(
    ("dim", "value_dim", "group"), [(24, 40, 2), (32, 16, 9), (64, 48, 3), (16, 64, 1)]
)
@pytest.mark.parametrize("kind", ["", "int8"])
def test_products_of_few_and_of_many_rows(kind, dim, value_dim, group):
    """Whole vectors of up to eight rows have loops of their own, the rest a BLAS."""
    layer = Layer(kind=kind, dim=dim, value_dim=value_dim)
    layer.append(200, append)
    layer.append(1, append, seed=1)
    query = torch.randn(layer.batch, layer.heads * group, 1, dim)
    inputs = (query, *layer.held(), *layer.state(), None, 4, 1, None, 0.0)
    result = attend(*inputs)
    expected = page_attention_reference(*inputs)
    torch.testing.assert_close(result, expected, atol=1e-5, rtol=1e-5)


def test_a_choice_is_kept_for_the_interval():
    layer = Layer(pages=20)
    layer.append(1000, append)
    at = []
    for step in range(9):
        layer.append(1, append, seed=step)
        attend(query_of(layer, step), *layer.held(), *layer.state(), None, 5, 4)
        at.append(layer.selected_at[0, 0].item())
    assert at == [1001] * 4 + [1005] * 4 + [1009]


def test_a_new_page_is_read_before_the_next_choice():
    layer = Layer(pages=6, batch=1)
    layer.append(255, append)
    for step in range(3):  # the second token begins a page
        layer.append(1, append, seed=step)
        query = query_of(layer, step)
        out = attend(query, *layer.held(), *layer.state(), None, 6, 4)
    keys, values = layer.all_keys()
    everything = torch.ones(1, 1, 1, keys.shape[2], dtype=torch.bool)
    assert layer.selected_at[0, 0] == 256
    assert_close(out, oracle(query, keys, values, everything, 32**-0.5), torch.float32)


@settings(max_examples=30, deadline=None)
@given(
    tokens=st.integers(1, 560),
    budget=st.integers(2, 9),
    padding=st.integers(0, 200),
    seed=st.integers(0, 1000),
)
def test_choice_is_sound(tokens, budget, padding, seed):
    layer = Layer(batch=1)
    layer.append(tokens, append, seed)
    mask = torch.arange(tokens)[None] >= min(padding, tokens - 1)
    attend(query_of(layer, seed), *layer.held(), *layer.state(), mask, budget, 1)
    first, newest = min(padding, tokens - 1) // PAGE, (tokens - 1) // PAGE
    for row in layer.selected[0].tolist():
        pages = [p for p in row if p >= 0]
        assert row == pages + [-1] * (len(row) - len(pages))
        assert pages == sorted(set(pages))
        assert len(pages) == min(budget, newest - first + 1)
        assert pages[0] == first
        assert pages[-1] == newest


def test_rows_of_the_batch_do_not_see_one_another():
    layer = Layer()
    layer.append(400, append)
    query = query_of(layer)
    both = attend(query, *layer.held(), *layer.state(), None, 3, 1)
    alone = Layer(batch=1)
    alone.append(
        400,
        lambda k, v, *rest: append(
            layer.keys[0][1:, ...], layer.values[0][1:, ...], *rest
        ),
    )
    one = attend(query[1:], *alone.held(), *alone.state(), None, 3, 1)
    torch.testing.assert_close(both[1:], one)


def test_softcap_and_scale():
    layer = Layer(batch=1)
    layer.append(130, append)
    query = query_of(layer)
    out = attend(query, *layer.held(), *layer.state(), None, 9, 4, 0.3, 5.0)
    keys, values = layer.all_keys()
    everything = torch.ones(1, 1, 1, 130, dtype=torch.bool)
    assert_close(out, oracle(query, keys, values, everything, 0.3, 5.0), torch.float32)


def test_several_query_rows_are_refused():
    layer = Layer()
    layer.append(10, append)
    query = torch.randn(2, 6, 2, 32)
    with pytest.raises(ValueError, match="2 query rows"):
        attend(query, *layer.held(), *layer.state(), None, 3, 1)


def test_opcheck():
    layer = Layer(rings=(2,))
    layer.append(200, append)
    arguments = (query_of(layer), *layer.held(), *layer.state(), None, 3, 1)
    tests = ("test_schema", "test_faketensor")
    torch.library.opcheck(attend, arguments, test_utils=tests)
