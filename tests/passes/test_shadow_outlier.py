"""`shadow-outlier` on graphs, against a model whose linears compute it eagerly."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache

from graphopt.calibration import Calibration, InputStatistics
from graphopt.calibration.observe import calibrate
from graphopt.config import load_config
from graphopt.errors import ConfigError
from graphopt.graph_diff import reports_of
from graphopt.ir.model_graph import ModelGraph
from graphopt.ops.int8.weights import quantize_weight
from graphopt.passes.base import PassContext
from graphopt.passes.linear.int8_settings import read_settings
from tests.models import TINY, capture, token_ids
from tests.rewriting import by_pieces, rewritten, traced


@pytest.fixture(scope="module")
def scales(tmp_path_factory):
    """Calibrations of tiny models, made once each."""
    folder, made = tmp_path_factory.mktemp("scales"), {}

    def of(name):
        if name not in made:
            texts = [token_ids(1, 40), token_ids(1, 33)]
            path = folder / f"{name}.toml"
            calibrate(TINY[name]().eval(), texts, trim=0.01).write(path)
            made[name] = str(path)
        return made[name]

    return of


def config_of(path, **options):
    given = {"scales": f"'{path}'", "weights": "memory", **options}
    inner = ",".join(f"{key}={value}" for key, value in given.items())
    return f"shadow-outlier{{{inner}}}"


class Int8(torch.nn.Module):
    """A linear in float32 over what the codes stand for."""

    def __init__(self, linear, setting):
        super().__init__()
        codes, scales = quantize_weight(linear.weight.detach())
        self.weight, self.codes = linear.weight, codes.float() * scales[:, None]
        self.bias, self.setting = linear.bias, setting

    def forward(self, x):
        scale = self.setting.scale
        codes = (x / scale).round().clamp(-128, 127) * scale
        result = F.linear(codes, self.codes, self.bias)
        if self.setting.shadow:
            beyond = x - x.clamp(-128 * scale, 127 * scale)
            result = result + F.linear(beyond, self.weight)
        return result


def oracle(model, path, prune, layers=None):
    settings, result = read_settings(path, prune), copy.deepcopy(model)
    for name, module in list(result.named_modules()):
        is_wanted = layers is None or any(f".{i}." in name for i in layers)
        if isinstance(module, torch.nn.Linear) and "layers" in name and is_wanted:
            parent = result.get_submodule(name.rpartition(".")[0])
            setting = settings.of(f"{name}.weight")
            setattr(parent, name.rpartition(".")[2], Int8(module, setting))
    return result


def invented(model):
    """Ranges that are the same on every machine: linear i clips at i + 1 steps."""
    found = Calibration(trim=0.0)
    for index, (name, weight) in enumerate(model.named_parameters()):
        if weight.ndim == 2:
            held = InputStatistics.of_width(1)
            held.add(torch.tensor([[float(127 * (index + 1))]]))
            found.inputs[name] = held
    return found


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_graph_diff(graph_diff, tmp_path, monkeypatch, name):
    model = TINY[name]()
    monkeypatch.chdir(tmp_path)  # the config's text is part of what is compared
    invented(model).write("invented.toml")
    config = config_of("invented.toml", prune=0.5)
    golden = f"shadow-outlier-{name}"
    text = graph_diff(model, config, golden, layer=1, input_ids=token_ids(1, 9))
    assert "graphopt.shadow_linear(" in text and "graphopt.quantize(" in text


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "prune"), [("llama", 0.0), ("gemma3", 0.5), ("phi3", 1.0)]
)
def test_equals_the_model_with_int8_linears(scales, name, prune):
    model, ids = TINY[name]().eval(), token_ids(2, 40)
    fast = rewritten(model, config_of(scales(name), prune=prune), host=traced)
    actual = fast(ids).logits
    expected = oracle(model, scales(name), prune)(ids).logits
    scale = float(expected.abs().max())
    dense = float((model(ids).logits - expected).abs().max())
    # A value that lies between two codes may round to either.
    assert (actual - expected).abs().max() < max(1e-3 * scale, dense / 5)


@torch.no_grad()
def test_layers(scales):
    model, ids = TINY["llama"]().eval(), token_ids(1, 21)
    exact = rewritten(model, config_of(scales("llama"), layers="[]"), host=traced)
    assert torch.equal(exact(ids).logits, model(ids).logits)
    config = config_of(scales("llama"), layers="[1]", prune=0.0)
    actual = rewritten(model, config, host=traced)(ids).logits
    expected = oracle(model, scales("llama"), 0.0, layers=[1])(ids).logits
    torch.testing.assert_close(actual, expected, atol=1e-3, rtol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize(
    "before",
    [
        "chunked-prefill{chunk=16}",
        "packed-prefill",
        "token-drop{schedule=[{layer=1,keep=0.5}],force=true}",
    ],
)
def test_composes(scales, before):
    model, ids = TINY["llama"]().eval(), token_ids(2, 40)
    given = {"attention_mask": torch.ones_like(ids)} if "pack" in before else {}
    config = config_of(scales("llama"))
    reports = []
    fast = rewritten(model, f"{before},{config}", host=traced, reports=reports)
    actual = fast(ids, **given).logits
    wide = rewritten(model, before, host=traced)(ids, **given).logits
    assert 0 < (actual - wide).norm() / wide.norm() < 0.1
    applied = [r for r in reports[0].records[1].remarks if r.kind == "applied"]
    # In a packed graph the head is a linear like others.
    assert len(applied) == 14 + (before == "packed-prefill")


@torch.no_grad()
def test_layers_stay_alike(scales):
    model, reports = TINY["llama"]().eval(), []
    fast = rewritten(model, config_of(scales("llama")), host=by_pieces, reports=reports)
    ids = token_ids(1, 21)
    expected = oracle(model, scales("llama"), 0.85)(ids).logits
    torch.testing.assert_close(fast(ids).logits, expected, atol=1e-3, rtol=1e-3)


@torch.no_grad()
def test_generates(scales):
    model, ids = TINY["llama"]().eval(), token_ids(1, 12)
    config = config_of(scales("llama"), prune=0.0, head="true")
    fast = rewritten(model, config, host=traced, dynamic=None)
    fast.generate(ids, max_new_tokens=4, do_sample=False)


class WeightOnly(torch.nn.Module):
    """A linear over what the codes of its weight stand for."""

    def __init__(self, linear):
        super().__init__()
        codes, scales = quantize_weight(linear.weight.detach())
        self.weight, self.bias = codes.float() * scales[:, None], linear.bias

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


@torch.no_grad()
@pytest.mark.parametrize(
    ("config", "host"),
    [("activations=float", by_pieces), ("activations=dynamic,weights=file", traced)],
    ids=["float", "file"],
)
def test_decodes_on_weights_alone(config, host):
    """A step's activations stay float, whatever those of the prompt were."""
    model, ids, reports = TINY["llama"]().eval(), token_ids(1, 9), []
    twin, cache = copy.deepcopy(model), DynamicCache()
    for name, module in list(twin.named_modules()):
        if isinstance(module, torch.nn.Linear):
            parent = twin.get_submodule(name.rpartition(".")[0])
            setattr(parent, name.rpartition(".")[2], WeightOnly(module))
    config = f"shadow-outlier{{head=true,{config}}}"
    fast = rewritten(model, config, host=host, dynamic=None, reports=reports)
    fast(ids, past_key_values=cache)
    other = copy.deepcopy(cache)
    for step in range(2):
        token = ids[:, step : step + 1]
        actual = fast(token, past_key_values=cache).logits
        expected = twin(token, past_key_values=other).logits
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
    assert "int8 weights over 1 row(s)" in str(reports[-1].records[0].remarks[0])


def test_weights_alone_have_no_derivatives():
    model, ids = TINY["llama"]().eval(), token_ids(1, 3)
    reports = []
    config = "shadow-outlier{activations=float}"
    rewritten(model, config, host=traced, reports=reports)(ids)
    assert "torch.no_grad()" in reports[0].records[0].remarks[0].message
    fast = rewritten(model, "shadow-outlier{activations=dynamic}", host=traced)
    fast(ids).logits.sum().backward()
    assert fast.model.layers[0].mlp.up_proj.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_dynamic_scales_need_no_file():
    model, ids = TINY["llama"]().eval(), token_ids(1, 21)
    config = "shadow-outlier{activations=dynamic,weights=memory}"
    actual = rewritten(model, config, host=traced)(ids).logits
    expected = model(ids).logits
    assert 0 < (actual - expected).norm() / expected.norm() < 0.05


def remarks_of(config, model=None):
    (report,) = reports_of(
        model or TINY["llama"](), config, {"input_ids": token_ids(1, 9)}
    )
    return report.records[0].remarks


def test_refusals(scales):
    path = scales("llama")
    found = remarks_of(config_of(path))
    assert [r.code for r in found if r.kind == "missed"] == ["layer"]
    assert all(r.kind == "applied" for r in remarks_of(config_of(path, head="true")))
    other = {r.code for r in remarks_of(config_of(scales("gpt2")))}
    assert other == {"uncalibrated", "layer"}


@pytest.mark.parametrize(
    ("device", "kind", "code"),
    [("cuda", "analysis", "weights"), ("xpu", "missed", "unsupported")],
)
def test_other_devices(scales, device, kind, code):
    """A GPU has kernels but no file for the float weights; others have neither."""
    (gm,) = capture(TINY["llama"](), input_ids=token_ids(1, 9))
    (item,) = load_config(config_of(scales("llama"), weights="file")).pipeline
    result = item.run(ModelGraph(gm), PassContext(device=device))
    assert (kind, code) in {(r.kind, r.code) for r in result.remarks}
    assert result.changed == (device == "cuda")
    assert not any("bytes_saved" in r.figures for r in result.remarks)


def test_mistakes(tmp_path):
    with pytest.raises(ConfigError, match="graphopt calibrate MODEL"):
        load_config("shadow-outlier")
    with pytest.raises(ConfigError, match="no calibration that can be read"):
        load_config(f"shadow-outlier{{scales='{tmp_path}/none.toml'}}")
