"""Low-rank adapters over shared weights."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

from graphopt.ensembles import with_adapter, with_low_rank
from graphopt.errors import ModelError
from tests.ensembles.members import llama
from tests.models import TINY, token_ids

NAMES = ("model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj")


def pairs(model, rank=3, scale=0.7):
    found = {}
    for name in NAMES:
        out, width = model.get_submodule(name).weight.shape
        found[name] = (torch.randn(rank, width), torch.randn(out, rank), scale)
    return found


def merged(model, adapters):
    """A copy whose weights have the products added."""
    twin = llama()
    twin.load_state_dict(model.state_dict())
    with torch.no_grad():
        for name, (down, up, scale) in adapters.items():
            twin.get_submodule(name).weight += scale * up @ down
    return twin


def written(folder, adapters, **config):
    tensors = {}
    for name, (down, up, _) in adapters.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = down
        tensors[f"base_model.model.{name}.lora_B.weight"] = up
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


@torch.no_grad()
def test_an_adapter_is_the_merged_model_and_shares_its_weights(tmp_path):
    model, ids = llama(), token_ids(2, 7)
    adapters = pairs(model, scale=0.7)
    before = model(ids).logits
    twin = with_low_rank(model, adapters)
    expected = merged(model, adapters)(ids).logits
    torch.testing.assert_close(twin(ids).logits, expected, atol=1e-4, rtol=1e-4)
    assert torch.equal(model(ids).logits, before)
    own = {id(p) for p in model.parameters()}
    assert own < {id(p) for p in twin.parameters()}
    folder = written(tmp_path, adapters, lora_alpha=2.1, bias="none", use_dora=False)
    assert torch.equal(with_adapter(model, folder)(ids).logits, twin(ids).logits)
    pattern = {"lora_alpha": 9, "alpha_pattern": {"q_proj": 2.1, "down_proj": 2.1}}
    again = with_adapter(model, written(tmp_path, adapters, **pattern))
    assert torch.equal(again(ids).logits, twin(ids).logits)


@torch.no_grad()
def test_scaled_by_the_root_of_the_rank(tmp_path):
    model, ids = llama(), token_ids(1, 7)
    adapters = pairs(model, rank=4, scale=1.5)
    folder = written(tmp_path, adapters, lora_alpha=3, use_rslora=True)
    expected = with_low_rank(model, adapters)(ids).logits
    assert torch.equal(with_adapter(model, folder)(ids).logits, expected)


@torch.no_grad()
def test_weights_that_lie_transposed():
    model, ids = TINY["gpt2"](), token_ids(1, 7)
    name = "transformer.h.0.attn.c_attn"
    down, up = torch.randn(3, 64), torch.randn(192, 3)
    twin = with_low_rank(model, {name: (down, up, 0.5)})
    expected = TINY["gpt2"]()
    expected.get_submodule(name).weight += 0.5 * (up @ down).T
    torch.testing.assert_close(
        twin(ids).logits, expected(ids).logits, atol=1e-4, rtol=1e-4
    )


def test_what_is_more_than_low_rank_is_refused(tmp_path):
    model = llama()
    adapters = pairs(model)
    cases = [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "all"}, "merge it"),
    ]
    for config, message in cases:
        with pytest.raises(ModelError, match=message):
            with_adapter(model, written(tmp_path, adapters, **config))
    with pytest.raises(ModelError, match="another model"):
        with_low_rank(model, {"model.layers.9.mlp.up_proj": adapters[NAMES[0]]})
    with pytest.raises(ModelError, match="channels"):
        with_low_rank(model, {NAMES[0]: adapters[NAMES[1]]})
    with pytest.raises(ModelError, match=r"adapter_config\.json"):
        with_adapter(model, tmp_path / "none")
    written(tmp_path, adapters)
    (tmp_path / "adapter_model.safetensors").unlink()
    with pytest.raises(ModelError, match="beside its config"):
        with_adapter(model, tmp_path)
    written(tmp_path, adapters)
    save_file(
        {"x.lora_embedding_A": torch.ones(1)}, tmp_path / "adapter_model.safetensors"
    )
    with pytest.raises(ModelError, match="no lora_A"):
        with_adapter(model, tmp_path)
