"""Auxiliary models: what is shared, what is saved, and what comes out of them."""

from __future__ import annotations

import copy

import pytest
import torch
import transformers as tf
from safetensors import safe_open
from torch import nn

from graphopt import learngene
from graphopt.errors import ConfigError, ModelError
from tests.learngene.models import MODELS, Plain, made, outputs
from tests.models import TINY, token_ids
from tests.rewriting import by_pieces, rewritten

PATHS = {"llama": "model.layers", "gpt2": "transformer.h", "plain": "trunk"}


def layers_of(model):
    return learngene.find_stack(model).layers


def copied_by_hand(model, firsts):
    """Return a copy of ``model`` whose layer i has the values of layer firsts[i]."""
    model = copy.deepcopy(model)
    layers = layers_of(model)
    states = [copy.deepcopy(layer.state_dict()) for layer in layers]
    for layer, first in zip(layers, firsts, strict=True):
        layer.load_state_dict(states[first])
    return model


@pytest.mark.parametrize("name", MODELS)
def test_layers_of_a_stage_compute_with_one_set_of_parameters(name):
    model = made(name)
    auxiliary = learngene.build(model, [1, 3])
    assert torch.equal(outputs(auxiliary), outputs(copied_by_hand(model, [0, 1, 1, 1])))
    first, second, third, _ = layers_of(auxiliary)
    both = zip(second.parameters(), third.parameters(), strict=True)
    assert all(one is two for one, two in both)
    assert first is not second
    each = sum(p.numel() for p in first.parameters())
    before, after = map(learngene.stored_parameters, (model, auxiliary))
    assert before - after == 2 * each
    assert learngene.plan_of(model) is None


@pytest.mark.parametrize("name", MODELS)
def test_a_checkpoint_has_each_shared_tensor_once(name, tmp_path):
    untied = ["ln_*" if name == "gpt2" else "*norm*"]
    auxiliary = learngene.build(made(name), [1, 3], untied=untied)
    learngene.save(auxiliary, tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = sum(file.get_tensor(key).numel() for key in file.keys())  # noqa: SIM118
    assert stored == learngene.stored_parameters(auxiliary)
    again = learngene.load(tmp_path, Plain() if name == "plain" else None)
    assert torch.equal(outputs(again), outputs(auxiliary))
    assert learngene.plan_of(again) == learngene.plan_of(auxiliary)
    assert learngene.stored_parameters(again) == stored


@pytest.mark.parametrize(("name", "path"), PATHS.items())
def test_finds_the_layers(name, path):
    assert learngene.find_stack(made(name)).path == path


def test_layers_that_cannot_be_found():
    with pytest.raises(ModelError, match="no list of two or more layers"):
        learngene.find_stack(nn.Linear(3, 3))
    model = made("llama")
    model.model.layers[2].mlp = nn.Linear(4, 4)
    with pytest.raises(ModelError, match="differ in mlp"):
        learngene.find_stack(model, "model.layers")
    with pytest.raises(ModelError, match="has no module"):
        learngene.find_stack(model, "model.blocks")
    with pytest.raises(ModelError, match="no list of layers"):
        learngene.find_stack(model, "model.norm")


def test_one_stack_of_several():
    model = TINY["llava"]()
    assert learngene.find_stack(model).path == "model.language_model.layers"
    tower = next(n for n, m in model.named_modules() if n.endswith("encoder.layers"))
    auxiliary = learngene.build(model, [1, 2], layers=tower)
    assert len(learngene.find_stack(auxiliary, tower)) == 3
    assert len(learngene.find_stack(auxiliary, "model.language_model.layers")) == 2
    assert auxiliary.config.vision_config.num_hidden_layers == 3
    assert auxiliary.config.text_config.num_hidden_layers == 2


def test_deeper_than_the_model_and_each_layer_keeps_its_kind():
    model = made("gemma3")
    auxiliary = learngene.build(model, [3, 5])
    assert len(layers_of(auxiliary)) == auxiliary.config.num_hidden_layers == 8
    kinds = [k for k in model.config.layer_types for _ in range(2)]
    assert auxiliary.config.layer_types == kinds
    assert [layer.self_attn.layer_idx for layer in layers_of(auxiliary)] == [*range(8)]
    ids = token_ids(1, 6)
    whole = auxiliary(ids, use_cache=False).logits[:, -1]
    kept = auxiliary(ids[:, :-1], use_cache=True).past_key_values
    step = auxiliary(ids[:, -1:], past_key_values=kept).logits[:, -1]
    torch.testing.assert_close(step, whole, atol=1e-5, rtol=1e-4)
    plain = learngene.build(made("plain"), [2, 4])
    assert [layer.number for layer in layers_of(plain)] == [*range(6)]


def test_means_and_new_values():
    model = made("vit")
    mean = learngene.build(model, [2, 2], init="mean", untied=["*norm*"])
    name = "mlp.fc1.weight"
    givers = [layer.get_parameter(name) for layer in layers_of(model)]
    tied = [layer.get_parameter(name) for layer in layers_of(mean)]
    assert torch.equal(tied[1], torch.stack(givers[:2]).mean(0))
    for one, two in zip(layers_of(model), layers_of(mean), strict=True):
        own = [p for n, p in one.named_parameters() if "norm" in n]
        kept = [p for n, p in two.named_parameters() if "norm" in n]
        assert own and all(map(torch.equal, own, kept))
    new, same, other = (
        outputs(learngene.build(model, [2, 2], init="random", seed=seed))
        for seed in (1, 1, 2)
    )
    assert torch.equal(new, same)
    assert not torch.equal(new, other)


def test_gradients_add_up():
    model = made("plain")
    apart, tied = learngene.build(model, [1] * 4), learngene.build(model, [4])
    apart.trunk.load_state_dict(tied.trunk.state_dict())
    for one in (apart, tied):
        one(torch.ones(2, 8)).square().sum().backward()
    parts = [layer.linear.weight.grad for layer in apart.trunk]
    torch.testing.assert_close(tied.trunk[0].linear.weight.grad, sum(parts))


def test_a_model_that_is_tied_in_place_is_saved_so(tmp_path):
    model = made("gpt2")
    wanted = learngene.build(model, [3, 1])
    learngene.tie(model, [3, 1])
    assert torch.equal(outputs(model), outputs(wanted))
    again = learngene.load(learngene.save(model, tmp_path))
    assert torch.equal(outputs(again), outputs(wanted))
    stored = map(learngene.stored_parameters, (model, again, wanted))
    assert len(set(stored)) == 1


def test_compiled_layer_by_layer_it_learns_what_it_learns_eagerly():
    auxiliary = learngene.build(made("vit"), [1, 3])
    pictures = {"pixel_values": torch.rand(2, 3, 8, 8), "labels": torch.tensor([1, 7])}
    fast = rewritten(auxiliary, "", host=by_pieces)
    for model in (auxiliary, fast):
        model(**pictures).loss.backward()
    both = zip(auxiliary.parameters(), fast.parameters(), strict=True)
    for one, two in both:
        torch.testing.assert_close(two.grad, one.grad, atol=1e-6, rtol=1e-4)


def test_a_model_whose_heads_and_norms_keep_their_function():
    auxiliary = learngene.build(made("vit"), [4, 4])
    attention = auxiliary.config.num_attention_heads, auxiliary.config.hidden_size
    descendant = learngene.expand(auxiliary, depth=3)
    config = descendant.config
    assert (config.num_attention_heads, config.hidden_size) == attention
    norms = [
        {m.eps for m in model.modules() if isinstance(m, nn.LayerNorm)}
        for model in (auxiliary, descendant)
    ]
    assert norms[0] == norms[1] == {config.layer_norm_eps}


def test_refusals():
    model = made("vit")
    auxiliary = learngene.build(model, [2, 2])
    cases = [
        (lambda: learngene.build(model, []), "give one or more layers"),
        (lambda: learngene.build(model, [2, 0]), "give one or more layers"),
        (lambda: learngene.build(model, [4], untied=["nrm"]), "fits no parameter"),
        (lambda: learngene.build(model, [4], init="zero"), "first, mean or random"),
        (lambda: learngene.build(auxiliary, [4]), "expand it first"),
        (lambda: learngene.expand(model, depth=4), "auxiliary model"),
        (lambda: learngene.expand(auxiliary), "either a map"),
        (lambda: learngene.expand(auxiliary, [0, 2]), "from 0 to 1"),
        (lambda: learngene.expand(auxiliary, [1, 0]), "earlier stage"),
        (lambda: learngene.expand(auxiliary, depth=1), "leaves out"),
        (lambda: learngene.even_stages(4, 5), "1 to 4 stages"),
    ]
    for call, message in cases:
        with pytest.raises(ConfigError, match=message):
            call()
    with pytest.raises(ModelError, match="are of 3 layers"):
        learngene.tie(made("plain"), [3])


@pytest.mark.parametrize("name", ["llama", "vit", "plain", "gemma3"])
def test_the_auxiliarys_own_map_gives_the_same_function(name):
    auxiliary = learngene.build(made(name), [1, 3], untied=["*norm*"])
    descendant = learngene.expand(auxiliary, [0, 1, 1, 1])
    assert torch.equal(outputs(descendant), outputs(auxiliary))
    assert learngene.plan_of(descendant) is None
    assert type(descendant) is type(made(name))
    parameters = [p for layer in layers_of(descendant) for p in layer.parameters()]
    assert len({p.data_ptr() for p in parameters}) == len(parameters)


@pytest.mark.parametrize("depth", [2, 5, 7])
def test_any_depth(depth, tmp_path):
    auxiliary = learngene.build(made("vit"), [2, 2])
    descendant = learngene.expand(auxiliary, depth=depth)
    stages = learngene.even_map(2, depth)
    firsts = [0, 2]
    for layer, stage in zip(layers_of(descendant), stages, strict=True):
        wanted = layers_of(auxiliary)[firsts[stage]].state_dict()
        assert all(torch.equal(wanted[n], p) for n, p in layer.state_dict().items())
    descendant.save_pretrained(tmp_path)
    again = tf.ViTForImageClassification.from_pretrained(tmp_path)
    assert torch.equal(outputs(again), outputs(descendant))


def test_the_papers_stages_and_map():
    assert learngene.even_stages(16, 5) == [3, 3, 4, 3, 3]
    assert learngene.even_map(5, 12) == [0, 0, 0, 1, 1, 1, 2, 2, 3, 3, 4, 4]
