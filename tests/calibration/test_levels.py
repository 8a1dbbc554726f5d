"""TEAL's levels: found layer by layer, kept in a file, used by `neuron-mask`."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch

from graphopt.calibration.levels import Levels
from graphopt.cli import levels as command
from graphopt.errors import ConfigError
from graphopt.search.levels import find_levels
from tests.calibration.observed import observed
from tests.models import TINY, token_ids
from tests.search.letters import Letters, prose

# Weights of a layer of the tiny Llama, by input.
SIZES = {"q_proj": 64, "k_proj": 32, "v_proj": 32, "o_proj": 64}
SIZES |= {"gate_proj": 128, "up_proj": 128, "down_proj": 128}
TOTAL = sum(SIZES.values())


@pytest.fixture(scope="module")
def found():
    """Levels of a model of which attention in layer 0 does nothing."""
    model = TINY["llama"]().eval()
    torch.nn.init.zeros_(model.model.layers[0].self_attn.o_proj.weight)
    calibration = observed(model, token_ids(1, 40))
    ids = torch.cat([token_ids(1, 24, seed) for seed in (1, 2)])
    return find_levels(model, ids, calibration, 0.3)


def levels_of(found, layer):
    ends = (name.split(".")[-2] for name in found.table)
    values = zip(ends, found.table.items(), strict=True)
    return {end: x for end, (name, x) in values if f"layers.{layer}." in name}


@pytest.mark.parametrize("layer", [0, 1])
def test_a_layer_gives_up_what_was_asked_for(found, layer):
    levels = levels_of(found, layer)
    assert levels.keys() == SIZES.keys()
    given_up = sum(SIZES[end] * level for end, level in levels.items()) / TOTAL
    assert given_up == pytest.approx(0.3)
    assert levels["q_proj"] == levels["k_proj"] == levels["v_proj"]
    assert levels["gate_proj"] == levels["up_proj"]
    assert all(0 <= level <= 0.95 for level in levels.values())


def test_what_does_no_harm_goes_first(found):
    levels = levels_of(found, 0)
    used = {end for end, level in levels.items() if level}
    assert used == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert any(levels_of(found, 1)[end] for end in ("gate_proj", "down_proj"))


def test_a_file(found, tmp_path):
    found.about = {"model": "tiny \"llama\""}  # fmt: skip
    path = found.write(tmp_path / "levels.toml")
    again = Levels.read(path)
    assert again.sparsity == 0.3 and again.about == found.about
    name = "model.layers.1.mlp.down_proj.weight"
    assert again.of(name) == pytest.approx(found.of(name), abs=1e-4)
    assert again.of("lm_head.weight") is None
    path.write_text("levels = 3")
    with pytest.raises(ConfigError, match="no levels that can be read"):
        Levels.read(path)


def test_the_command_writes_a_file(tmp_path, monkeypatch, capsys):
    model = TINY["llama"]().eval()
    observed(model, token_ids(1, 40)).write(tmp_path / "tiny")
    (tmp_path / "text.txt").write_text(prose(400))
    loaded = SimpleNamespace(model=model, tokenizer=Letters())
    monkeypatch.setattr(command, "load_with_text", lambda *_: loaded)
    given = {"text": f"{tmp_path}/text.txt", "tokens": 16, "samples": 2, "step": 0.1}
    given |= {"out": f"{tmp_path}/levels.toml", "seed": 1, "dtype": "float32"}
    command.levels("tiny", f"{tmp_path}/tiny.toml", 0.2, as_json=True, **given)
    assert json.loads(capsys.readouterr().out)["linears"] == 14
    found = Levels.read(tmp_path / "levels.toml")
    assert found.sparsity == 0.2 and found.about["model"] == "tiny"
    given["out"] = "no/folder/levels.toml"
    with pytest.raises(ConfigError, match="there is no folder no/folder"):
        command.levels("tiny", f"{tmp_path}/tiny.toml", 0.2, **given)
