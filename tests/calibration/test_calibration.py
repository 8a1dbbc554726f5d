"""Ranges of activations: counted, named, written and read."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from graphopt.calibration import Calibration, Magnitudes
from graphopt.calibration.names import find_name
from graphopt.calibration.observe import calibrate
from graphopt.errors import ConfigError, PassError
from tests.models import TINY, token_ids


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**31), st.floats(0.0, 1.0), st.floats(-2, 6))
def test_quantiles_are_those_of_the_values_up_to_a_bin(seed, share, scale):
    values = torch.randn(999, generator=torch.Generator().manual_seed(seed))
    values *= 10**scale
    counted = Magnitudes()
    for part in values.split(100):
        counted.add(part)
    found, step = counted.quantile(share), 2 ** (1 / 32)
    assert (values.abs() <= found * step).double().mean() >= share - 1e-9
    assert (values.abs() <= found / step).double().mean() <= share + 1 / 999


def test_zeros_and_what_is_no_number():
    counted = Magnitudes()
    assert counted.quantile(0.5) == 0.0
    counted.add(torch.zeros(7))
    assert counted.quantile(0.5) < 1e-6
    with pytest.raises(ValueError, match="finite"):
        counted.add(torch.tensor([1.0, float("nan")]))


def hooked(model, texts):
    """What modules are given, by their weight's name: rows of all texts."""
    seen, handles = {}, []
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):

            def see(_, args, key=f"{name}.weight"):
                seen.setdefault(key, []).append(args[0].flatten(0, -2))

            handles.append(module.register_forward_pre_hook(see))
    with torch.no_grad():
        for ids in texts:
            model(ids, logits_to_keep=1)
    for handle in handles:
        handle.remove()
    first = {id(p): name for name, p in model.named_parameters()}  # of tied ones
    return {
        first[id(model.get_parameter(name))]: torch.cat(rows)
        for name, rows in seen.items()
    }


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_ranges_are_those_that_hooks_see(name):
    model = TINY[name]().eval()
    texts = [token_ids(1, 24), token_ids(1, 17) + 1]
    found = calibrate(model, texts, trim=0.01)
    expected = hooked(model, texts)
    assert found.inputs.keys() == expected.keys()
    for key, rows in expected.items():
        held = found.inputs[key]
        torch.testing.assert_close(held.channel_maximum, rows.abs().amax(0))
        limit = held.clipped(0.01)
        beyond = rows.abs() > limit
        assert (held.outliers - beyond.sum(0)).abs().sum() <= 1 + beyond.sum() // 20
        assert 0 < beyond.double().mean() < 0.02
    downs = {key for key in expected if "down_proj" in key}
    assert found.gates.keys() == downs


def test_plain_ffns_have_no_gates_and_conv1d_is_a_linear():
    model = TINY["gpt2"]().eval()
    found = calibrate(model, [token_ids(1, 9)])
    assert not found.gates
    assert found.input_of("transformer.h.0.mlp.c_proj.weight").tokens == 9


def test_round_trip(tmp_path):
    found = calibrate(TINY["llama"](), [token_ids(1, 9)])
    found.about = {"model": 'a "name"', "seed": 3}
    text, arrays = found.write(tmp_path / "some.thing.toml")
    assert (text.name, arrays.name) == ("some.thing.toml", "some.thing.safetensors")
    for path in (text, arrays):
        again = Calibration.read(path)
        assert again.about == found.about and again.inputs.keys() == found.inputs.keys()
        for key, held in found.inputs.items():
            other = again.input_of(f"_orig_mod.{key}")
            assert other.clipped(0.01) == held.clipped(0.01)
            assert torch.equal(other.outliers, held.outliers)
        for key in found.gates:
            assert again.threshold("gate", key, 0.5) == found.gates[key].quantile(0.5)
    with pytest.raises(ConfigError, match="holds no input of nothing"):
        again.threshold("input", "nothing", 0.5)


def test_files_that_are_none(tmp_path):
    with pytest.raises(ConfigError, match="graphopt calibrate"):
        Calibration.read(tmp_path / "missing.toml")
    (tmp_path / "bad.toml").write_text("trim = 1")
    with pytest.raises(ConfigError, match="no calibration"):
        Calibration.read(tmp_path / "bad.toml")


def test_names():
    known = ["layers.1.up.weight", "layers.11.up.weight", "head.weight"]
    assert find_name("model.layers.1.up.weight", known) == "layers.1.up.weight"
    assert find_name("1.up.weight", known) == "layers.1.up.weight"
    assert find_name("up.weight", known) is None
    assert find_name("weight", ["a.weight", "b.weight"]) is None


def test_a_model_without_linears():
    with pytest.raises(PassError, match="no linear"):
        calibrate(_Embedding(), [token_ids(1, 9)])


class _Embedding(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.table = torch.nn.Embedding(256, 4)

    def forward(self, input_ids, use_cache, logits_to_keep):
        from transformers.modeling_outputs import CausalLMOutputWithPast

        return CausalLMOutputWithPast(logits=self.table(input_ids).sin())
