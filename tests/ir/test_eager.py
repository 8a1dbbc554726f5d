"""Eager attention of plain functions: what is raised, and what only looks like it."""

from __future__ import annotations

import pytest
import sympy
import torch
from torch.nn import functional as F
from torch.utils._sympy.functions import Max, Min

from graphopt.config import load_config
from graphopt.ir.dce import eliminate_dead_code
from graphopt.ir.match import at_least_zero, op_name
from graphopt.ir.model_graph import ModelGraph
from graphopt.pipeline import run_passes


def captured(function, *inputs):
    graphs = []

    def backend(gm, examples):
        graphs.append(gm)
        return gm.forward

    torch._dynamo.reset()
    torch.compile(function, backend=backend, dynamic=False)(*inputs)
    return graphs[0]


def tensors(batch=2, heads=4, kv_heads=4, tokens=12):
    q = torch.randn(batch, heads, tokens, 8)
    k, v = (torch.randn(batch, kv_heads, tokens, 8) for _ in range(2))
    return q, k, v


def hidden(q, lowest):
    n = q.shape[2]
    return torch.full((n, n), lowest).triu(1)


def scores(q, k):
    return q @ k.transpose(-1, -2) * 0.5 + hidden(q, float("-inf"))


def plain(q, k, v):
    return scores(q, k).softmax(-1) @ v


def shifted(q, k, v):
    s = scores(q, k)
    return (s - s.max(dim=-1, keepdim=True).values).softmax(-1) @ v


def shifted_by_amax(q, k, v):
    s = scores(q, k)
    return (s - s.amax(-1, keepdim=True)).softmax(-1) @ v


def biased(q, k, v):
    s = scores(q, k)
    return (s - s.max(dim=-2, keepdim=True).values).softmax(-1) @ v


def shifted_by_another(q, k, v):
    return (scores(q, k) - scores(k, q).amax(-1, keepdim=True)).softmax(-1) @ v


def by_position_of_the_maximum(q, k, v):
    s = scores(q, k)
    return (s - s.max(dim=-2, keepdim=True).indices).softmax(-1) @ v


def sliced(q, k, v):
    return scores(q, k).softmax(-1)[..., :8] @ v[:, :, :8]


def weights_too(q, k, v):
    weights = scores(q, k).softmax(-1)
    return weights @ v, weights


def dropped(q, k, v):
    return F.dropout(scores(q, k).softmax(-1), 0.1, training=True) @ v


def not_dropped(q, k, v):
    return F.dropout(scores(q, k).softmax(-1), 0.1, training=False) @ v


@pytest.mark.parametrize("function", [plain, shifted, shifted_by_amax, not_dropped])
def test_raised(function):
    gm = captured(function, *tensors())
    sites = ModelGraph(gm).attention
    assert [(s.form, s.pattern, s.scale) for s in sites] == [("eager", "causal", 0.5)]
    given = dict(zip(("l_q_", "l_k_", "l_v_"), tensors(), strict=True))
    expected = function(*given.values())
    assert run_passes(gm, load_config("structured-mask").pipeline)[0].changed
    assert not [n for n in gm.graph.nodes if op_name(n) in ("softmax", "matmul")]
    gm.recompile()
    inputs = [given[n.name] for n in gm.graph.nodes if n.op == "placeholder"]
    torch.testing.assert_close(gm(*inputs)[0], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "function",
    [
        biased,
        shifted_by_another,
        by_position_of_the_maximum,
        sliced,
        weights_too,
    ],
)
def test_not_raised(function):
    view = ModelGraph(captured(function, *tensors()))
    assert view.attention == []
    assert [code for _, code, _ in view.missed()] == ["no-attention", "not-raised"]


def reason(function, *inputs):
    (site,) = ModelGraph(captured(function, *inputs)).attention
    return site.unsupported


def test_dropout_is_refused():
    assert reason(dropped, *tensors()) == "dropout"


@pytest.mark.parametrize(
    ("lowest", "text"),
    [(float("-inf"), "rows that see no key become NaN"), (-1e9, None)],
)
def test_padding_that_gives_nan(lowest, text):
    def function(q, k, v, padding):
        mask = hidden(q, lowest)[None, None]
        mask = mask.masked_fill(~padding[:, None, None, :], lowest)
        return (q @ k.transpose(-1, -2) + mask).softmax(-1) @ v

    padding = torch.ones(2, 12, dtype=torch.bool)
    assert reason(function, *tensors(), padding) == text


def written_after_the_scores(q, k, v):
    weights = scores(q, k).softmax(-1)
    k.zero_()
    return weights @ v


def written_after_the_copy(q, k, v):
    keys, values = (t.repeat_interleave(2, dim=1) for t in (k, v))
    v.zero_()
    return F.scaled_dot_product_attention(q, keys, values, is_causal=True)


@pytest.mark.parametrize("function", [written_after_the_scores, written_after_the_copy])
def test_tensors_that_change(function):
    kv_heads = 2 if function is written_after_the_copy else 4
    assert "written in place" in reason(function, *tensors(kv_heads=kv_heads))


def test_a_padding_mask_that_changes():
    def function(q, k, v, padding):
        mask = hidden(q, 0.0) == 0
        mask = mask.tril() & padding[:, None, None, :]
        padding.zero_()
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)

    padding = torch.ones(2, 12, dtype=torch.bool)
    assert "written in place" in reason(function, *tensors(), padding)


def test_tensors_written_before_they_are_read():
    def function(q, k, v):
        k.mul_(2.0)
        return plain(q, k, v)

    assert reason(function, *tensors()) is None


@pytest.mark.parametrize(
    ("lowest", "text"), [(float("-inf"), "become NaN"), (-1e9, "average all values")]
)
def test_a_first_row_without_keys(lowest, text):
    """Strictly earlier keys only: row 0 sees none."""

    def function(q, k, v):
        mask = torch.full((q.shape[2], q.shape[2]), lowest).triu(0)
        return (q @ k.transpose(-1, -2) + mask).softmax(-1) @ v

    assert text in reason(function, *tensors())


def test_at_least_zero():
    a, b = sympy.symbols("a b", integer=True, positive=True)
    assert at_least_zero(a - 1)
    assert at_least_zero(a - sympy.Max(0, a - b + 1))
    assert not at_least_zero(a - sympy.Max(0, a - b) - 2)
    assert at_least_zero(Max(0, a - b) + Min(a, b))
    assert not at_least_zero(a - b)


@pytest.mark.parametrize("batch", [1, 2])
def test_broadcast_batches_are_refused(batch):
    """The kernel wants one key row for each query row of the batch."""

    def function(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)

    q, k, v = tensors()
    found = reason(function, q, k[:batch], v[:batch])
    assert (found is None) == (batch == 2)
    assert batch == 2 or "tensors of sizes" in found


def test_attention_of_another_rank_is_reported():
    def function(q, k, v):
        return F.scaled_dot_product_attention(q, k, v)

    view = ModelGraph(captured(function, *(t[0] for t in tensors())))
    assert view.attention == []
    assert [reason for _, code, reason in view.missed() if code == "not-raised"] == [
        "attention over tensors of sizes " + ", ".join(["[4, 12, 8]"] * 3)
    ]


def test_a_router_is_no_attention():
    def function(x, w):
        return torch.topk(F.linear(x, w).softmax(-1), 2).values

    view = ModelGraph(captured(function, torch.randn(6, 8), torch.randn(4, 8)))
    assert [code for _, code, _ in view.missed()] == ["no-attention"]


@pytest.mark.parametrize(("training", "kept"), [(True, 1), (False, 0)])
def test_dead_dropout(training, kept):
    """In training it draws random numbers, which later draws depend on."""

    def function(x):
        F.dropout(x, 0.5, training=training)
        return x + 1

    gm = captured(function, torch.randn(5))
    eliminate_dead_code(gm)
    assert sum(op_name(n) == "dropout" for n in gm.graph.nodes) == kept
