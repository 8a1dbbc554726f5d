"""`skinny-linear` on graphs, in generation and in training."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

from graphopt.graph_diff import reports_of
from graphopt.ir.match import op_name
from graphopt.ir.model_graph import ModelGraph
from graphopt.passes.base import PassContext
from graphopt.passes.linear.skinny_linear import SkinnyLinear
from tests.models import TINY, capture, token_ids
from tests.rewriting import inductor, rewritten, traced


def decoding(model, batch=1, tokens=12):
    cache = DynamicCache()
    with torch.no_grad():
        model(token_ids(batch, tokens), past_key_values=cache)
    return {"input_ids": token_ids(batch, 1), "past_key_values": cache}


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "mixtral", "gpt_neox"])
def test_graph_diff(graph_diff, name):
    model = TINY[name]()
    text = graph_diff(
        model, "skinny-linear", f"skinny-linear-{name}", layer=1, **decoding(model)
    )
    assert "graphopt.skinny_linear(" in text


def codes(model, config="skinny-linear", **inputs):
    reports = reports_of(model, config, inputs)
    return {r.code for report in reports for p in report.records for r in p.remarks}


def test_prompts_and_batches_are_left_alone():
    model = TINY["llama"]()
    assert codes(model, input_ids=token_ids(1, 9)) == {"many-rows"}
    assert codes(model, **decoding(model, batch=3)) == {"many-rows"}
    assert "layout" in codes(TINY["gpt2"](), **decoding(TINY["gpt2"]()))


def test_rates_of_other_types_are_predicted():
    half = TINY["llama"]().half()
    assert codes(half, **decoding(half)) == {"slower"}
    forced = codes(half, "skinny-linear{force=true}", **decoding(half))
    assert forced == {"rewritten"}


def test_other_devices_read_at_memorys_rate():
    (gm,) = capture(TINY["llama"](), **decoding(TINY["llama"]()))
    result = SkinnyLinear().run(ModelGraph(gm), PassContext(device="cuda"))
    assert {r.code for r in result.remarks} == {"slower"}
    assert not result.changed


def test_autocast_is_left_alone():
    model = TINY["llama"]()
    inputs = decoding(model)
    with torch.autocast("cpu", torch.bfloat16):
        assert "unsupported" in codes(model, **inputs)


def steps_by_inductor(gm, inputs):
    """What the pass leaves alone is compiled elsewhere."""
    rewritten = any(op_name(n) == "graphopt.skinny_linear" for n in gm.graph.nodes)
    return (inductor if rewritten else traced)(gm, inputs)


@pytest.mark.parametrize(
    ("name", "batch"), [("llama", 1), ("gemma3", 3), ("mixtral", 1)]
)
def test_generates_the_same_tokens(name, batch):
    model, ids, reports = TINY[name]().eval(), token_ids(batch, 12), []
    host = steps_by_inductor if name == "llama" else traced
    fast = rewritten(model, "skinny-linear", host=host, dynamic=None, reports=reports)
    wanted = {"max_new_tokens": 8, "do_sample": False}
    expected = model.generate(ids, **wanted)
    torch.testing.assert_close(fast.generate(ids, **wanted), expected)
    applied = [
        r
        for report in reports
        for r in report.all_remarks()
        if r.pass_name == "skinny-linear" and r.kind == "applied"
    ]
    assert applied[0].figures["rows"] == batch


def test_gradients_are_those_of_the_model():
    model, ids = TINY["llama"](), token_ids(1, 3)
    model(ids, labels=ids).loss.backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    fast = rewritten(model, "skinny-linear", host=traced, dynamic=False)
    fast(ids, labels=ids).loss.backward()
    for name, parameter in fast.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], msg=name)


def test_a_pass_after_it_still_finds_the_ffn():
    model = TINY["llama"]()
    (gm,) = capture(model, **decoding(model))
    before = [site.form for site in ModelGraph(gm).ffn]
    SkinnyLinear().run(ModelGraph(gm), PassContext())
    assert [site.form for site in ModelGraph(gm).ffn] == before == ["gated"] * 2
    again = SkinnyLinear().run(ModelGraph(gm), PassContext())
    assert not again.changed
