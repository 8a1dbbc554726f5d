"""`neuron-mask` with TEAL and CATS, against eager models whose inputs are zeroed."""

from __future__ import annotations

import copy
from unittest import mock

import pytest
import torch
import transformers as tf
from transformers import DynamicCache

from graphopt.calibration.levels import Levels
from graphopt.config import load_config
from graphopt.errors import ConfigError
from graphopt.ir.match import op_name
from graphopt.ir.model_graph import ModelGraph
from graphopt.outline import compile_outlined
from graphopt.passes.base import PassContext
from graphopt.passes.ffn import sparse_rule
from graphopt.passes.ffn.input_sparsity import sparsify
from graphopt.passes.ffn.neuron_mask import NeuronMask
from tests.calibration.observed import observed
from tests.models import TINY, capture, copy_graph, token_ids
from tests.rewriting import rewritten, traced

SPARSITY = 0.5
FOUR_LAYERS = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 100,
}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Calibrations of tiny models, made once each."""
    folder, made = tmp_path_factory.mktemp("calibrations"), {}

    def of(name):
        if name not in made:
            found = observed(TINY[name]().eval(), token_ids(1, 40, seed=3))
            path = folder / name
            found.write(path)
            made[name] = (f"{path}.toml", found)
        return made[name]

    return of


@pytest.fixture(scope="module")
def step():
    """The graph of a decoding step of the tiny Llama."""
    model = TINY["llama"]()
    (gm,) = capture(model, dynamic=False, **decoding(model))
    return lambda: copy_graph(gm)


def config(method, path):
    return f'neuron-mask{{method={method},thresholds="{path}",force=true}}'


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
        if type(module).__name__ in ("Linear", "Conv1D") and name != "lm_head":
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
@pytest.mark.parametrize(
    ("method", "name", "batch"),
    [
        ("teal", "gemma3", 3),
        ("cats", "llama", 3),
        ("cats", "gemma3", 1),
        ("teal", "gpt2", 1),
    ],
)
def test_a_step_is_that_of_zeroed_inputs(files, method, name, batch):
    path, found = files(name)
    model, reports = TINY[name]().eval(), []
    oracle = copy.deepcopy(model)
    ORACLES[method](oracle, found)
    fast = rewritten(model, config(method, path), dynamic=False, reports=reports)
    expected = oracle(**decoding(model, batch)).logits
    actual = fast(**decoding(model, batch)).logits
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)
    dense = model(**decoding(model, batch)).logits
    assert (dense - expected).abs().max() > 1e-2
    applied = [r for r in reports[-1].all_remarks() if r.kind == "applied"]
    linears = {"gpt2": 8}.get(name, 14)
    assert len(applied) == (linears if method == "teal" else 2)
    copied = [r.figures["bytes"] > 0 for r in applied]
    assert copied == [name != "gpt2"] * len(applied)  # whose weights lie by input


@torch.no_grad()
def test_layers_with_thresholds_of_their_own_are_compiled_once(tmp_path):
    torch.manual_seed(0)
    model, found = tf.LlamaForCausalLM(tf.LlamaConfig(**FOUR_LAYERS)).eval(), []
    calibration = observed(model, token_ids(1, 40))
    calibration.write(tmp_path / "four")
    oracle = copy.deepcopy(model)
    teal(oracle, calibration)

    def outlined(gm, inputs):
        result = compile_outlined(gm, traced)
        found.append((result.layers, result.kinds))
        return result.run or traced(gm, inputs)

    text = config("teal", tmp_path / "four.toml")
    fast = rewritten(model, text, host=outlined, dynamic=False)
    expected = oracle(**decoding(model)).logits
    actual = fast(**decoding(model)).logits
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=1e-4)
    assert found == [(4, 1)]


def codes(gm, calibration, device="cpu", **options):
    given = {"method": "teal", "thresholds": "given", "force": True} | options
    item, context = NeuronMask(**given), PassContext(device=device)
    result = sparsify(ModelGraph(gm), item, context, calibration)
    assert result.changed == any(r.kind == "applied" for r in result.remarks)
    return {r.code for r in result.remarks}


def test_what_is_left_alone(files, step):
    path, found = files("llama")
    for method in ORACLES:
        exact = NeuronMask(method=method, thresholds=path, sparsity=0.0, force=True)
        (remark,) = exact.run(ModelGraph(step()), PassContext()).remarks
        assert remark.code == "dense"
        assert codes(step(), found, method=method, force=False) == {"slower"}
        assert codes(step(), found, method=method) == {"rewritten"}
        assert codes(step(), found, method=method, layers=[5]) == set()
    (prompt,) = capture(TINY["llama"](), input_ids=token_ids(1, 9))
    item = NeuronMask(method="teal", thresholds=path, force=True)
    (remark,) = item.run(ModelGraph(prompt), PassContext()).remarks
    assert remark.code == "not-decode"


def test_a_gain_is_predicted_by_rows_and_device(files, step):
    _, found = files("llama")
    rule = sparse_rule.Rule(0.5, False, "cpu", found)
    sites = ModelGraph(step()).linears[:1]
    assert rule.refusal(sites)[0] == "slower"
    with mock.patch.dict(sparse_rule._CALL, {"cpu": 1e-9, "cuda": 1.0}):
        assert rule.refusal(sites) is None
        assert codes(step(), found, force=False) == {"rewritten"}
        assert codes(step(), found, "cuda", force=False) == {"slower"}


def test_levels_are_sparsities_of_their_own(files, step, tmp_path):
    path, found = files("llama")
    names = [n for n in found.inputs if "layers.0" in n or "layers.1.mlp" in n]
    table = {name: 0.1 * (index + 1) for index, name in enumerate(names[:6])}
    written = Levels(0.4, table).write(tmp_path / "levels.toml")
    given = {"thresholds": path, "levels": str(written), "force": True}
    item = NeuronMask(method="teal", sparsity=0.4, **given)
    remarks = item.run(ModelGraph(step()), PassContext()).remarks
    applied = [r.figures["threshold"] for r in remarks if r.kind == "applied"]
    wanted = [found.threshold("input", *level) for level in table.items()]
    assert sorted(applied) == pytest.approx(sorted(wanted))
    assert {r.code for r in remarks if r.kind == "missed"} == {"dense"}
    other = NeuronMask(method="teal", **given)
    with pytest.raises(ConfigError, match=r"leave out 0\.4 and the config says 0\.5"):
        other.run(ModelGraph(step()), PassContext())
    with pytest.raises(ConfigError, match="levels belong to method = 'teal'"):
        load_config('neuron-mask{method=cats,thresholds="x",levels="y"}')


def test_thresholds_are_asked_for():
    with pytest.raises(ConfigError, match="graphopt calibrate MODEL --text FILE"):
        load_config("neuron-mask{method=cats}")
    load_config("neuron-mask{method=cats,sparsity=0}")


def test_a_calibration_of_another_model(files, step):
    _, other = files("gpt2")
    with pytest.raises(ConfigError, match="was it made of this model"):
        codes(step(), other)


@pytest.mark.parametrize("method", ORACLES)
def test_sites_are_found_again(files, step, method):
    path, _ = files("llama")
    gm = step()
    before = ModelGraph(gm)
    forms, linears = [s.form for s in before.ffn], len(before.linears)
    item = NeuronMask(method=method, thresholds=path, force=True)
    assert item.run(before, PassContext()).changed
    gm.graph.lint()
    after = ModelGraph(gm)
    assert [s.form for s in after.ffn] == forms
    assert len(after.linears) == linears
    result = item.run(after, PassContext())
    assert not result.changed and {r.code for r in result.remarks} == {"done"}
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
