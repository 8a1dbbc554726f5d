"""`onednn-linear` on graphs, in generation and in training."""

from __future__ import annotations

import pytest
import torch

from graphopt.graph_diff import reports_of
from graphopt.ir.model_graph import ModelGraph
from graphopt.ops.onednn_linear import prepared
from graphopt.passes.base import PassContext
from graphopt.passes.linear.onednn_linear import OneDnnLinear
from tests.models import TINY, capture, token_ids
from tests.rewriting import rewritten, traced


def codes(model, config="onednn-linear", **inputs):
    reports = reports_of(model, config, inputs)
    return {r.code for report in reports for p in report.records for r in p.remarks}


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_graph_diff(graph_diff, name):
    text = graph_diff(
        TINY[name](),
        "onednn-linear",
        f"onednn-linear-{name}",
        layer=1,
        input_ids=token_ids(1, 9),
    )
    assert "graphopt.onednn_linear(" in text


def test_refusals():
    model, ids = TINY["llama"](), token_ids(1, 9)
    assert codes(model, input_ids=ids) == {"rewritten"}
    (gm,) = capture(model, dynamic=False, input_ids=token_ids(1, 3))
    result = OneDnnLinear().run(ModelGraph(gm), PassContext())
    assert {r.code for r in result.remarks} == {"few-rows"}
    narrow = TINY["llama"]().bfloat16()
    assert codes(narrow, input_ids=ids) == {"slower"}
    assert codes(narrow, "onednn-linear{force=true}", input_ids=ids) == {"rewritten"}
    assert codes(TINY["llama"]().half(), input_ids=ids) == {"unsupported"}


def test_other_devices():
    (gm,) = capture(TINY["llama"](), input_ids=token_ids(1, 9))
    result = OneDnnLinear().run(ModelGraph(gm), PassContext(device="cuda"))
    assert {r.code for r in result.remarks} == {"unsupported"}
    assert not result.changed


@pytest.mark.parametrize("config", ["", "chunked-prefill{chunk=8}", "packed-prefill"])
def test_generates_the_same_tokens_from_weights_laid_out_once(config):
    model, ids = TINY["llama"]().eval(), token_ids(2, 19)
    text = ",".join(filter(None, (config, "onednn-linear")))
    fast = rewritten(model, text, host=traced)
    before = prepared.made
    for _ in range(2):
        with torch.no_grad():
            actual = fast(ids).logits
    torch.testing.assert_close(actual, model(ids).logits, atol=2e-5, rtol=1e-4)
    linears = sum(isinstance(m, torch.nn.Linear) for m in model.modules())
    head = config.startswith("chunked")  # is not in the loop that later passes rewrite
    assert prepared.made == before + linears - head


def test_gradients():
    model, ids = TINY["llama"](), token_ids(2, 9)
    model(ids, labels=ids).loss.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    fast = rewritten(model, "onednn-linear", host=traced)
    fast(ids, labels=ids).loss.backward()
    for parameter, wanted in zip(fast.parameters(), expected, strict=True):
        torch.testing.assert_close(parameter.grad, wanted, atol=1e-6, rtol=1e-4)
