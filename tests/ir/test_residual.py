"""The residual stream of real models: its adds, and what enters and leaves layers."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from graphopt.backend import rewrite
from graphopt.ir.copying import copy_module
from graphopt.ir.match import op_name, shape_of, sizes_of, value_of
from graphopt.ir.model_graph import ModelGraph
from graphopt.options import parse_options
from tests.ir.views import LENGTH, build, inputs_of, later_view, values, view

# Residual adds of a layer: one where attention and FFN are summed before.
ADDS = {
    "llama": 2, "gemma3": 2, "phi3": 2, "gpt2": 2, "opt": 2, "mixtral": 2, "gpt_oss": 2,
    "bert": 2, "vit": 2, "granite": 2, "cohere": 2, "gpt_neox": 1, "falcon": 1,
    "gptj": 1,
}  # fmt: skip
PARALLEL = ("cohere", "gpt_neox", "falcon", "gptj")


@pytest.mark.parametrize("name", ADDS)
def test_layers_hand_the_stream_on(name):
    model = view(name)
    first, second = model.layers
    assert first.output is second.input
    assert [len(x.residual_adds) for x in model.layers] == [ADDS[name]] * 2
    assert len(model.residual) == 1
    stream = model.residual[0]
    assert stream.adds == first.residual_adds + second.residual_adds
    assert (stream.input, stream.output) == (first.input, second.output)
    assert not [row for row in model.missed() if row[1] == "no-residual"]


@pytest.mark.parametrize("name", ADDS)
def test_the_stream_holds_hidden_states_of_every_token(name):
    model = view(name)
    query = model.attention[0].query
    batch, tokens = sizes_of(query)[0], sizes_of(query)[2]
    for layer in model.layers:
        assert sizes_of(layer.input) == (batch, tokens, 64)
        assert sizes_of(layer.output) == (batch, tokens, 64)


@pytest.mark.parametrize("name", ADDS)
def test_adds_join_stream_and_branch(name):
    for layer in view(name).layers:
        adds = layer.residual_adds
        assert adds[0].attention == (layer.index,)
        assert all(not add.attention for add in adds[1:])
        assert adds[0].stream is layer.input
        for add in adds:
            assert op_name(add.node) == "add"
            assert add.branch in add.node.args
        for before, after in pairwise(adds):
            parallel = before.stream is after.stream
            assert parallel == (name in PARALLEL)


def test_post_norm_layers_end_with_their_norm():
    model = view("bert")
    norms = {norm.output: norm for norm in model.norms}
    for layer in model.layers:
        assert norms[layer.output].input is layer.residual_adds[-1].node


@pytest.mark.parametrize("name", ["llama", "gpt2", "gpt_neox", "mixtral"])
def test_pre_norm_layers_end_with_their_last_add(name):
    for layer in view(name).layers:
        assert layer.output is layer.residual_adds[-1].node


def test_flattened_tokens_are_unfolded_at_the_end_of_a_layer():
    for layer in view("opt").layers:
        assert len(shape_of(layer.residual_adds[1].node)) == 2
        assert op_name(layer.output) == "reshape"
        assert layer.output.args[0] is layer.residual_adds[1].node


def test_a_stream_is_found_around_attention_that_is_not_raised():
    (stream,) = view("bloom").residual
    assert len(stream.adds) == 4
    first, second = stream.layers
    assert first.output is second.input
    assert (len(first.adds), len(second.adds)) == (2, 2)


def test_encoder_and_decoder_have_streams_of_their_own():
    model = view("bart")
    encoder, decoder = model.residual
    assert [len(x.adds) for x in encoder.layers] == [2]
    # Self-attention, then cross-attention with the FFN.
    assert [x.attention for x in decoder.layers] == [(1,), (2,)]
    assert [len(x.adds) for x in decoder.layers] == [1, 2]
    assert model.layers[1].output is model.layers[2].input


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_decode(name):
    first, second = later_view(name).layers
    assert first.output is second.input
    assert sizes_of(second.output) == (1, 1, 64)
    assert len(first.residual_adds) == len(second.residual_adds) == 2


def test_static_shapes():
    first, second = view("llama", dynamic=False).layers
    assert first.output is second.input
    assert tuple(value_of(second.output).shape) == (2, LENGTH, 64)


def eager_layers(name, model):
    """Return input and output of every layer as the model itself computes them."""
    layers = {
        "llama": "model.layers",
        "gpt_neox": "gpt_neox.layers",
        "bert": "encoder.layer",
    }
    seen = []

    def record(module, args, kwargs, output):
        hidden = args[0] if args else kwargs["hidden_states"]
        seen.append((hidden, output[0] if isinstance(output, tuple) else output))

    for layer in model.get_submodule(layers[name]):
        layer.register_forward_hook(record, with_kwargs=True)
    with torch.no_grad():
        hidden_states = model(
            **inputs_of(name), output_hidden_states=True
        ).hidden_states
    return seen, hidden_states


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "bert"])
def test_values_are_the_hidden_states_of_the_model(name):
    model = view(name)
    ends = [node for layer in model.layers for node in (layer.input, layer.output)]
    found = values(model, ends)
    expected, hidden_states = eager_layers(name, build(name))
    for layer, (before, after), state in zip(
        model.layers, expected, hidden_states[:-1], strict=True
    ):
        assert torch.equal(found[layer.input], before)
        assert torch.equal(found[layer.input], state)
        assert torch.equal(found[layer.output], after)


def test_rewritten_attention_leaves_the_stream_as_it_was():
    model = view("gemma3")
    copy = copy_module(model.gm)
    rewrite(copy, parse_options({"config": "structured-mask"}))
    after = ModelGraph(copy)
    assert any(site.form == "op" for site in after.attention)
    names = [(x.input.name, x.output.name) for x in after.layers]
    assert names == [(x.input.name, x.output.name) for x in model.layers]


def inserted(gm, source, function, *args):
    """Put a call that only this test needs behind ``source``, for all its users."""
    with gm.graph.inserting_after(source):
        node = gm.graph.call_function(function, (source, *args))
    node.meta["example_value"] = value_of(source)
    source.replace_all_uses_with(node, lambda user: user is not node)
    return node


def test_selected_tokens_stay_on_the_stream():
    copy = copy_module(view("llama").gm)
    end = ModelGraph(copy).layers[0].output
    kept = inserted(copy, end, torch.narrow, 1, 0, LENGTH)
    first, second = ModelGraph(copy).layers
    assert first.output is end
    assert second.input is kept
    assert len(second.residual_adds) == 2


@pytest.mark.parametrize("inside", [True, False])
def test_a_hidden_state_that_bypasses_the_end_of_its_layer_is_reported(inside):
    copy = copy_module(view("llama").gm)
    first, second = ModelGraph(copy).layers
    hidden = first.residual_adds[0].node if inside else first.input
    with copy.graph.inserting_after(second.output):
        late = copy.graph.call_function(torch.maximum, (hidden, second.output))
    late.meta["example_value"] = value_of(hidden)
    model = ModelGraph(copy)
    assert model.layers[0].input is None
    assert model.layers[0].output is None
    assert model.layers[1].input is second.input
    rows = [row[:2] for row in model.missed()]
    assert rows == [("layer[0]", "no-residual")]


def test_a_stream_that_is_lost_between_layers_is_reported():
    copy = copy_module(view("llama").gm)
    inserted(copy, ModelGraph(copy).layers[0].output, torch.flip, [1])
    rows = [row[:2] for row in ModelGraph(copy).missed()]
    assert rows == [("layer[0]", "no-residual"), ("layer[1]", "no-residual")]
