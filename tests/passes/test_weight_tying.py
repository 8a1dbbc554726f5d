"""`weight-tying`: what layers read, against models whose modules share parameters."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import graphopt
from graphopt.errors import ConfigError
from graphopt.graph_diff import reports_of
from graphopt.ir.model_graph import ModelGraph
from graphopt.options import parse_options
from graphopt.outline import compile_outlined
from graphopt.passes.base import PassContext
from graphopt.passes.weights.stages import StackLayer
from graphopt.passes.weights.weight_tying import WeightTying
from graphopt.remarks import Remark
from tests.models import TINY, capture, token_ids
from tests.rewriting import rewritten, traced

LAYERS = {
    "llama": "model.layers",
    "gemma3": "model.layers",
    "gpt2": "transformer.h",
    "vit": "layers",
}


def inputs_of(name: str) -> dict[str, torch.Tensor]:
    if name == "vit":
        generator = torch.Generator().manual_seed(1)
        return {"pixel_values": torch.rand(2, 3, 32, 32, generator=generator)}
    return {"input_ids": token_ids(2, 9)}


def deep(name: str, layers: int = 4) -> nn.Module:
    """Return a tiny model of so many random layers."""
    model = TINY[name]()
    config = copy.deepcopy(model.config)
    if kinds := getattr(config, "layer_types", None):
        config.layer_types = [kinds[i % len(kinds)] for i in range(layers)]
    config.num_hidden_layers = layers
    torch.manual_seed(1)
    made = type(model)(config).eval()
    for parameter in made.parameters():
        nn.init.normal_(parameter, std=0.1)
    return made


def share(model: nn.Module, name: str, stages: list[int]) -> nn.Module:
    """Return a copy whose layers hold the parameters of their stage's first one."""
    model = copy.deepcopy(model)
    layers, first = model.get_submodule(LAYERS[name]), 0
    for size in stages:
        for index in range(first, first + size):
            for path, value in list(layers[first].named_parameters()):
                owner, _, leaf = path.rpartition(".")
                setattr(layers[index].get_submodule(owner), leaf, value)
        first += size
    return model


def codes(model, config, **inputs):
    reports = reports_of(model, config, inputs)
    return [r.code for report in reports for p in report.records for r in p.remarks]


@pytest.mark.parametrize("name", ["llama", "gpt2", "vit"])
def test_graph_diff(graph_diff, name):
    config, golden = "weight-tying{stages=[2]}", f"weight-tying-{name}"
    graph_diff(TINY[name](), config, golden, layer=1, **inputs_of(name))


@pytest.mark.parametrize("name", ["gemma3", "vit"])
def test_outputs_are_those_of_modules_that_share(name):
    model, inputs = deep(name, 3), inputs_of(name)
    fast = rewritten(model, "weight-tying{stages=[1,2],expect=1}")
    with torch.no_grad():
        wanted, actual = share(model, name, [1, 2])(**inputs)[0], fast(**inputs)[0]
        untied = model(**inputs)[0]
    torch.testing.assert_close(actual, wanted, atol=1e-6, rtol=1e-5)
    assert (actual - untied).abs().max() > 1e-3


def test_stages_of_one_layer_and_equal_layers_are_the_model_bit_for_bit():
    model, inputs = deep("gpt2", 2), inputs_of("gpt2")
    first, second = model.get_submodule(LAYERS["gpt2"])
    second.load_state_dict(first.state_dict())
    reports = []
    configs = ("", "weight-tying{stages=[1,1]}", "weight-tying{stages=[2],expect=1}")
    with torch.no_grad():
        wanted, alone, tied = (
            rewritten(model, c, host=traced, reports=reports)(**inputs)[0]
            for c in configs
        )
    assert torch.equal(alone, wanted)
    assert torch.equal(tied, wanted)
    (record,) = reports[1].records
    assert not record.changed
    assert [r.code for r in record.remarks] == ["single"] * 2
    assert reports[2].records[0].changed


def test_gradients_add_up_in_the_first_layer():
    model, inputs = deep("llama", 3), inputs_of("llama")
    shared = share(model, "llama", [2, 1])
    shared(**inputs, labels=inputs["input_ids"]).loss.backward()
    fast = rewritten(model, "weight-tying{stages=[2,1]}", host=traced)
    fast(**inputs, labels=inputs["input_ids"]).loss.backward()
    wanted, found = (m.get_submodule(LAYERS["llama"]) for m in (shared, fast))
    for index in (0, 2):
        both = zip(wanted[index].parameters(), found[index].parameters(), strict=True)
        for one, two in both:
            torch.testing.assert_close(two.grad, one.grad, atol=1e-6, rtol=1e-4)
    assert all(p.grad is None for p in found[1].parameters())


@pytest.mark.parametrize("cache", ["dynamic", "pages"])
def test_each_layer_keeps_its_own_keys(cache):
    model, ids = deep("gpt2", 3), token_ids(2, 7)
    shared = share(model, "gpt2", [2, 1])
    fast = rewritten(model, "weight-tying{stages=[2,1]},onednn-linear")
    found = []
    for one in (shared, fast):
        kept = graphopt.Cache(max_tokens=32) if cache == "pages" else None
        options = {"past_key_values": kept, "max_new_tokens": 3, "do_sample": False}
        mask = torch.ones_like(ids)
        found.append(one.generate(ids, attention_mask=mask, **options))
    assert torch.equal(*found)


def test_behind_it_layers_go_into_a_loop_over_chunks():
    model, ids = deep("llama", 2), token_ids(1, 19)
    config = "weight-tying{stages=[2]},chunked-prefill{chunk=8}"
    fast = rewritten(model, config)
    with torch.no_grad():
        wanted = share(model, "llama", [2])(ids).logits
        torch.testing.assert_close(fast(ids).logits, wanted, atol=2e-5, rtol=1e-4)
    with pytest.raises(ConfigError, match="tie them first"):
        parse_options({"config": "chunked-prefill,weight-tying"})


def test_layers_of_all_stages_are_compiled_once():
    (gm,) = capture(deep("vit", 3), **inputs_of("vit"))
    assert WeightTying(stages=[2, 1]).run(ModelGraph(gm), PassContext()).changed
    again = WeightTying(stages=[2, 1]).run(ModelGraph(gm), PassContext())
    assert [r.code for r in again.remarks] == ["done", "single"]
    outlined = compile_outlined(gm, lambda module, _: module)
    assert (outlined.layers, outlined.kinds) == (3, 1)


def test_auto_finds_layers_that_are_alike():
    model, inputs = deep("llama"), inputs_of("llama")
    layers = model.get_submodule("model.layers")
    layers[2].load_state_dict(layers[1].state_dict())
    with torch.no_grad():
        for value in layers[2].parameters():
            value += 0.001 * torch.randn_like(value)
    (report,) = reports_of(model, "weight-tying", inputs)
    found, *stages = report.records[0].remarks
    assert found.message == "stages = [1, 2, 1] within 0.1"
    assert found.figures["distances"][2] == pytest.approx(0.01 / 2**0.5, rel=0.1)
    assert [r.code for r in stages] == ["single", "rewritten", "single"]
    assert stages[1].figures["parameters"] == 9
    exact = codes(model, "weight-tying{tolerance=0.0}", **inputs)
    assert exact == ["stages"] + ["single"] * 4


def test_untied_parts_stay_each_layers_own():
    model, inputs = deep("gpt2", 2), inputs_of("gpt2")
    config = 'weight-tying{stages=[2],untied=[norm,bias,"*.mlp.*"]}'
    (report,) = reports_of(model, config, inputs)
    (remark,) = report.records[0].remarks
    sizes = 64 * 192 + 64 * 64  # the weights of attention
    assert remark.figures == {"bytes": 4 * sizes, "parameters": 2}
    left = codes(model, "weight-tying{stages=[2],untied=[normm]}", **inputs)
    assert left == ["unmatched", "rewritten"]


def test_refusals():
    model, inputs = deep("llama", 2), inputs_of("llama")
    (gm,) = capture(model, **inputs)
    for node in gm.graph.nodes:
        node.meta.pop("grapharg", None)
    for item, code in (
        (WeightTying(stages=[2, 2]), "count"),
        (WeightTying(stages=[2], stack=1), "count"),
        (WeightTying(), "no-values"),
    ):
        result = item.run(ModelGraph(gm), PassContext())
        assert [r.code for r in result.remarks] == [code]
    model.model.layers[1].mlp.up_proj.weight.requires_grad_(False)
    assert codes(model, "weight-tying{stages=[2]}", **inputs) == ["shape"]
    model.model.layers[1].mlp.act_fn = nn.GELU()
    assert codes(model, "weight-tying{stages=[2]}", **inputs) == ["structure"]
    wide = deep("llama", 2)
    wide.model.layers[1].mlp.up_proj = nn.Linear(64, 128)
    assert codes(wide, "weight-tying{stages=[2]}", **inputs) == ["structure"]
    pair = [StackLayer((), (), ())] * 2
    chosen = WeightTying(stages=[2])._choose([pair, pair])
    assert isinstance(chosen, Remark)
    assert chosen.code == "ambiguous"
    assert WeightTying(stages=[2], stack=1)._choose([pair, pair]) == pair
    linear = nn.Linear(4, 4)
    (gm,) = capture(linear, input=torch.rand(2, 4))
    result = WeightTying(stages=[2]).run(ModelGraph(gm), PassContext())
    assert [r.code for r in result.remarks] == ["no-layers"]
    for wrong in ("stages=[]", "stages=[0]", "stages=both", "tolerance=2"):
        with pytest.raises(ConfigError, match=wrong.split("=")[0]):
            parse_options({"config": f"weight-tying{{{wrong}}}"})
