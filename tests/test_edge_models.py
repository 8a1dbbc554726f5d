"""Through the backend: no attention, training on padded rows, NaN, returned weights."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

from graphopt.backend import last_reports
from graphopt.config import load_config
from graphopt.ir.constants import fold_float_attributes
from graphopt.ir.model_graph import ModelGraph
from graphopt.pipeline import run_passes
from graphopt.verify import compare_first_call
from tests.models import TINY, capture, padding_mask, token_ids
from tests.tiny_configs import tiny_model


def compiled(model, **options):
    return torch.compile(model, backend="graphopt", dynamic=True, options=options)


@torch.no_grad()
def test_a_model_without_attention():
    model = tiny_model("mamba", tf.MambaForCausalLM, num_hidden_layers=1)
    inputs = {"input_ids": token_ids(1, 3), "use_cache": False}
    expected = model(**inputs).logits
    actual = compiled(model)(**inputs).logits
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)
    report = last_reports()[-1]
    assert report.kind == "unknown"
    assert "no-attention" in [r.code for r in report.all_remarks()]


def test_a_training_step_on_padded_rows():
    model = TINY["llama"]().train()
    ids, mask = token_ids(2, 16), padding_mask([16, 9], 16)
    labels = ids.masked_fill(mask == 0, -100)

    def gradients(function):
        model.zero_grad()
        loss = function(
            input_ids=ids, attention_mask=mask, labels=labels, use_cache=False
        ).loss
        loss.backward()
        return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}

    loss, expected = gradients(model)
    before = len(last_reports())
    same, actual = gradients(compiled(model))
    remarks = [r for one in last_reports()[before:] for r in one.all_remarks()]
    assert sum(r.code == "rewritten" for r in remarks) == 2, remarks
    torch.testing.assert_close(same, loss)
    for key, grad in expected.items():
        torch.testing.assert_close(actual[key], grad, atol=1e-6, rtol=1e-3)


@torch.no_grad()
def test_returned_weights_need_the_scores():
    model = TINY["llama"]()
    model.set_attn_implementation("eager")
    inputs = {"input_ids": token_ids(1, 12), "output_attentions": True}
    graphs = capture(model, **inputs)
    for gm in graphs:
        fold_float_attributes(gm)
    views = [ModelGraph(gm) for gm in graphs]
    assert not [site for view in views for site in view.attention]
    rows = [row for view in views for row in view.missed() if row[1] == "not-raised"]
    assert ["output" in text for _, _, text in rows] == [True, True], rows
    for gm in graphs:
        assert not any(r.changed for r in run_passes(gm, load_config(None).pipeline))


@torch.no_grad()
def test_nan_stays_nan():
    """A NaN weight gives NaN where the unrewritten model has it, and nowhere else."""
    model = TINY["llama"]()
    model.model.layers[1].self_attn.v_proj.weight[0, 0] = float("nan")
    inputs = {
        "input_ids": token_ids(2, 12),
        "attention_mask": padding_mask([12, 7], 12),
    }
    (gm,) = capture(model, **inputs, use_cache=False)
    (before,) = gm(*gm.meta["arguments"])
    assert run_passes(gm, load_config(None).pipeline)[0].changed
    gm.recompile()
    (after,) = gm(*gm.meta["arguments"])
    assert before.isnan().any()
    assert torch.equal(after.isnan(), before.isnan())


@pytest.mark.parametrize(
    ("value", "worst", "scale"),
    [(float("nan"), float("inf"), 3.0), (4.0, 1.0, 3.0), (3.0, 0.0, 3.0)],
)
def test_the_comparison_sees_nan(value, worst, scale):
    """NaN on one side is a difference; NaN on both hides neither it nor the scale."""
    rest = torch.tensor([float("nan"), 3.0])
    found = []

    def original(x):
        return (rest,)

    def other(x):
        return (torch.tensor([float("nan"), value]),)

    compare_first_call(original, other, lambda *figures: found.append(figures))(rest)
    assert found == [(worst, scale)]
