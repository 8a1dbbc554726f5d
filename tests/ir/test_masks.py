"""Masks read back from graphs that Dynamo captures of plain functions."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from graphopt.ir.attention.site import find_attention
from graphopt.ir.masks.index_expr import Evaluator
from graphopt.ir.masks.read import UnknownMaskError, read_mask
from graphopt.ir.match import argument, op_name


def captured(build, *inputs, dynamic=True):
    """The graph of sdpa(q, q, q, build(q, *inputs))."""
    graphs = []

    def backend(gm, examples):
        graphs.append(gm)
        return gm.forward

    def function(q, *rest):
        return F.scaled_dot_product_attention(q, q, q, attn_mask=build(q, *rest))

    torch._dynamo.reset()
    q = torch.randn(2, 4, 12, 8)
    torch.compile(function, backend=backend, dynamic=dynamic)(q, *inputs)
    return graphs[0]


def form_of(build, *inputs, dynamic=True):
    gm = captured(build, *inputs, dynamic=dynamic)
    node = next(n for n in gm.graph.nodes if op_name(n) == "sdpa")
    return read_mask(argument(node, 3, "attn_mask"), Evaluator(gm.graph))


def positions(q):
    n = q.shape[2]
    return torch.arange(n)[None, :], torch.arange(n)[:, None]


def by_comparison(q):
    k, r = positions(q)
    return k <= r


def by_tril(q):
    return torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).tril()


def by_triu(q):
    hidden = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool).triu(1)
    return ~hidden


def by_infinity(q):
    return torch.full((q.shape[2], q.shape[2]), float("-inf")).triu(1)


def by_lowest(q):
    k, r = positions(q)
    return torch.where(k <= r, 0.0, torch.finfo(torch.float32).min)[None, None]


def by_masked_fill(q):
    k, r = positions(q)
    return torch.zeros(q.shape[2], q.shape[2]).masked_fill(k > r, float("-inf"))


def by_logic(q):
    k, r = positions(q)
    return torch.logical_not(torch.logical_or(k > r, k >= r + 1))


def by_product(q):
    k, r = positions(q)
    return (1.0 - (k <= r).float()) * -1e9


CAUSAL = [by_comparison, by_tril, by_triu, by_infinity, by_lowest, by_masked_fill]


@pytest.mark.parametrize("dynamic", [True, False])
@pytest.mark.parametrize("build", [*CAUSAL, by_logic, by_product])
def test_causal_in_any_spelling(build, dynamic):
    form = form_of(build, dynamic=dynamic)
    assert (form.pattern, form.offset, form.key_mask) == ("causal", 0, None)


@pytest.mark.parametrize(
    ("build", "finite"), [(by_infinity, False), (by_lowest, True), (by_tril, False)]
)
def test_how_it_hides(build, finite):
    assert form_of(build).finite is finite


def window_of_one(q):
    k, r = positions(q)
    return (k <= r) & (r - k < 1)


def window_of_five(q):
    k, r = positions(q)
    return torch.ones_like(k <= r).tril().triu(-4)


@pytest.mark.parametrize(("build", "width"), [(window_of_one, 1), (window_of_five, 5)])
def test_windows(build, width):
    form = form_of(build)
    assert (form.pattern, form.window) == ("sliding-window", width)


def test_an_offset():
    def build(q):
        k, r = positions(q)
        return k <= r + 3

    assert form_of(build).offset == 3


@pytest.mark.parametrize(
    "read",
    [
        lambda m: m.bool(),
        lambda m: m != 0,
        lambda m: m.to(torch.bool),
        lambda m: m > 0,
        lambda m: m == 1,
    ],
)
def test_padding_in_any_spelling(read):
    def build(q, mask):
        k, r = positions(q)
        return (k <= r)[None, None] & read(mask)[:, None, None, :]

    form = form_of(build, torch.ones(2, 12, dtype=torch.long))
    assert form.pattern == "causal"
    assert form.key_mask is not None
    assert form.key_mask.meta["example_value"].dtype == torch.bool


def test_padding_alone():
    form = form_of(
        lambda q, m: m[:, None, None, :], torch.ones(2, 12, dtype=torch.bool)
    )
    assert form.pattern == "full"
    assert form.key_mask is not None


def alibi(q):
    k, r = positions(q)
    return torch.where(k <= r, (k - r).float(), float("-inf"))


def by_data(q, mask):
    return mask


def by_index(q, mask):
    k, r = positions(q)
    return k <= mask[:1, :1].long() + r


def written(q):
    mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool)
    mask[:, 3] = False
    return mask.tril()


def written_through_a_view(q):
    mask = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool)
    mask[0].fill_(False)
    return mask.tril()


def future(q):
    k, r = positions(q)
    return k >= r


def block_diagonal(q):
    k, r = positions(q)
    return k // 4 == r // 4


@pytest.mark.parametrize(
    ("build", "inputs", "reason"),
    [
        (alibi, (), "bias"),
        (by_data, (torch.ones(12, 12, dtype=torch.bool),), "data"),
        (by_data, (torch.randn(12, 12),), "data"),
        (by_index, (torch.ones(12, 12),), "data"),
        (written, (), "data"),
        (written_through_a_view, (), "data"),
        (future, (), "several|without"),
        (block_diagonal, (), "condition"),
    ],
)
def test_refusals(build, inputs, reason):
    with pytest.raises(UnknownMaskError, match=reason):
        form_of(build, *inputs)


def test_a_site_keeps_the_reason():
    sites = find_attention(captured(alibi, dynamic=False))
    assert ["bias" in str(s.unsupported) for s in sites] == [True]
