"""`neuron-mask` with TEAL and CATS, against eager models whose inputs are zeroed."""

from __future__ import annotations

import copy

import pytest
import torch
from transformers import DynamicCache

from graphopt.calibration.observe import calibrate
from graphopt.graph_diff import reports_of
from graphopt.ir.match import op_name
from graphopt.ir.model_graph import ModelGraph
from graphopt.passes.base import PassContext
from graphopt.passes.ffn.neuron_mask import NeuronMask
from tests.models import TINY, capture, token_ids
from tests.rewriting import by_pieces, rewritten, traced

SPARSITY = 0.5
MODELS = ("llama", "gemma3")


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Calibrations of tiny models, made once each."""
    folder, made = tmp_path_factory.mktemp("calibrations"), {}

    def of(name):
        if name not in made:
            found = calibrate(TINY[name]().eval(), [token_ids(1, 40, seed=3)])
            path = folder / name
            found.write(path)
            made[name] = (f"{path}.toml", found)
        return made[name]

    return of


def config(method, path, **options):
    given = {"method": method, "thresholds": f'"{path}"', "force": "true"} | options
    text = ",".join(f"{name}={value}" for name, value in given.items())
    return f"neuron-mask{{{text}}}"


def decoding(model, batch=1, tokens=12):
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(token_ids(batch, tokens), past_key_values=cache)
    return {"input_ids": token_ids(batch, 1, seed=9), "past_key_values": cache}


def without_small(x, threshold):
    return x.where(x.abs() > threshold, 0)


def teal(model, found):
    """Zero the small inputs of every linear of the layers."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "layers" in name:
            at = found.threshold("input", f"{name}.weight", SPARSITY)
            module.register_forward_pre_hook(
                lambda _, given, at=at: (without_small(given[0], at),)
            )


def cats(model, found):
    """Zero the nearly closed gates, behind the activation."""
    for name, module in model.named_modules():
        if name.endswith(".mlp"):
            weight = f"{name}.down_proj.weight"
            at = found.threshold("gate", weight, SPARSITY)
            module.act_fn = copy.deepcopy(module.act_fn)
            module.act_fn.register_forward_hook(
                lambda _, given, out, at=at: without_small(out, at)
            )


ORACLES = {"teal": teal, "cats": cats}


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("method", ORACLES)
@pytest.mark.parametrize("batch", [1, 3])
def test_a_step_is_that_of_zeroed_inputs(files, name, method, batch):
    path, found = files(name)
    model, reports = TINY[name]().eval(), []
    oracle = copy.deepcopy(model)
    ORACLES[method](oracle, found)
    text = config(method, path)
    fast = rewritten(model, text, host=traced, dynamic=False, reports=reports)
    expected = oracle(**decoding(model, batch)).logits
    actual = fast(**decoding(model, batch)).logits
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)
    dense = model(**decoding(model, batch)).logits
    assert (dense - expected).abs().max() > 1e-2
    applied = [r for r in reports[-1].all_remarks() if r.kind == "applied"]
    assert len(applied) == (14 if method == "teal" else 2)


@torch.no_grad()
@pytest.mark.parametrize("method", ORACLES)
def test_generates_with_layers_outlined(files, method):
    path, _ = files("llama")
    model, reports = TINY["llama"]().eval(), []
    text = config(method, path)
    given = {"max_new_tokens": 4, "do_sample": False}
    plain = rewritten(model, text, host=traced, dynamic=None)
    pieces = rewritten(model, text, host=by_pieces, dynamic=None, reports=reports)
    ids = token_ids(1, 12)
    assert torch.equal(pieces.generate(ids, **given), plain.generate(ids, **given))
    kinds = [{r.code for r in report.all_remarks()} for report in reports]
    assert "not-decode" in kinds[0] and "rewritten" in kinds[-1]


def codes(model, text, **inputs):
    reports = reports_of(model, text, inputs)
    return {r.code for report in reports for p in report.records for r in p.remarks}


@pytest.mark.parametrize("method", ORACLES)
def test_what_is_left_alone(files, method):
    path, _ = files("llama")
    model = TINY["llama"]()
    given = config(method, path)
    assert codes(model, given, input_ids=token_ids(1, 9)) == {"not-decode"}
    assert codes(model, config(method, path, sparsity=0), **decoding(model)) == {
        "dense"
    }
    assert codes(model, config(method, path, force="false"), **decoding(model)) == {
        "slower"
    }
    wide = TINY["llama"]().double()
    assert codes(wide, given, **decoding(wide)) == {"unsupported"}


def test_a_model_without_its_calibration(files):
    path, _ = files("llama")
    model = TINY["gpt2"]()
    (report,) = reports_of(model, config("teal", path), decoding(model))
    (remark,) = report.records[0].remarks
    assert remark.kind == "failure" and "graphopt calibrate" in remark.message


def test_an_ffn_without_a_gate(files):
    path, _ = files("gpt2")
    model = TINY["gpt2"]()
    assert codes(model, config("cats", path), **decoding(model)) == {"unsupported"}
    assert codes(model, config("teal", path), **decoding(model)) == {"rewritten"}


@pytest.mark.parametrize("method", ORACLES)
def test_sites_are_found_again(files, method):
    path, _ = files("llama")
    model = TINY["llama"]()
    (gm,) = capture(model, **decoding(model))
    before = ModelGraph(gm)
    forms, linears = [s.form for s in before.ffn], len(before.linears)
    item = NeuronMask(method=method, thresholds=path, force=True)
    assert item.run(before, PassContext()).changed
    gm.graph.eliminate_dead_code()
    gm.graph.lint()
    after = ModelGraph(gm)
    assert [s.form for s in after.ffn] == forms
    assert len(after.linears) == linears
    assert not item.run(after, PassContext()).changed
    names = [op_name(node) for node in gm.graph.nodes]
    assert names.count("graphopt.thresholds") == 1


def test_training_has_the_gradients_of_what_is_computed(files):
    path, found = files("llama")
    model, ids = TINY["llama"](), token_ids(1, 1)
    oracle = copy.deepcopy(model)
    teal(oracle, found)
    fast = rewritten(model, config("teal", path), host=traced, dynamic=False)
    for one in (oracle, fast):
        one(ids).logits.square().sum().backward()
    for mine, wanted in zip(fast.parameters(), oracle.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, wanted.grad, atol=1e-4, rtol=1e-3)
