"""Cache sites of real models: what is read, what is written, and what is kept."""

from __future__ import annotations

import pytest
import torch

from graphopt.ir.caches.sites import find_caches
from graphopt.ir.copying import copy_module
from graphopt.ir.match import op_name, sizes_of
from graphopt.ir.model_graph import ModelGraph
from tests.ir.views import (
    LENGTH,
    PAST,
    SLOTS,
    later_decoder_view,
    later_view,
    static_prefill_view,
    values,
    view,
)
from tests.models import WINDOW

DECODERS = (
    "llama", "gemma3", "phi3", "gpt2", "opt", "gpt_neox", "falcon", "mixtral",
    "gpt_oss", "gptj", "cohere", "granite",
)  # fmt: skip
WINDOWED = {"gemma3": (0,), "gpt_oss": (0,)}


def states(layer):
    return layer.cache.key, layer.cache.value


def outputs(model):
    return model.gm.graph.find_nodes(op="output")[0].args[0]


@pytest.mark.parametrize("name", DECODERS)
def test_first_prefill(name):
    model = view(name)
    assert [site.index for site in model.caches] == [0, 1]
    for layer in model.layers:
        assert layer.cache.kind == "concat"
        key, value = states(layer)
        assert key.attended is layer.attention.key
        assert value.attended is layer.attention.value
        for state in (key, value):
            assert state.past is None
            assert state.kept in outputs(model)
            assert sizes_of(state.new) == sizes_of(state.attended)
        assert key.kept is not value.kept


@pytest.mark.parametrize("name", DECODERS)
def test_a_window_keeps_its_last_keys(name):
    for layer in view(name).layers:
        for state in states(layer):
            windowed = layer.index in WINDOWED.get(name, ())
            assert (op_name(state.kept) == "getitem") == windowed
            if windowed:
                assert sizes_of(state.kept)[2] == WINDOW - 1
            else:
                assert sizes_of(state.kept) == sizes_of(state.attended)


@pytest.mark.parametrize("tokens", [1, 5])
@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_later_calls_read_the_past(name, tokens):
    model = later_view(name, tokens)
    pasts = set()
    for layer in model.layers:
        assert layer.cache.kind == "concat"
        for state in states(layer):
            assert state.past.op == "placeholder"
            assert state.kept in outputs(model)
            found = values(model, [state.past, state.new, state.attended])
            joined = torch.cat([found[state.past], found[state.new]], dim=-2)
            assert torch.equal(found[state.attended], joined)
            assert found[state.new].shape[2] == tokens
            pasts.add(state.past)
    assert len(pasts) == 4


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_prefill_of_a_static_cache(name):
    model = static_prefill_view(name)
    for layer in model.layers:
        assert layer.cache.kind == "in-place"
        for state in states(layer):
            assert state.past is None
            assert state.kept in outputs(model)
            found = values(model, [state.new, state.attended])
            assert torch.equal(found[state.attended], found[state.new])
        slots = WINDOW if name == "mistral" else SLOTS
        kept = values(model, outputs_of(layer))
        assert {v.shape[2] for v in kept.values()} == {slots}


def outputs_of(layer):
    return [state.kept for state in states(layer)]


def test_decode_with_a_static_cache():
    model = later_view("llama", static=True)
    for layer in model.layers:
        assert layer.cache.kind == "in-place"
        for state in states(layer):
            assert state.past.op == "placeholder"
            assert state.past is state.kept is state.attended
            (write,) = [u for u in state.past.users if op_name(u) == "index_copy_"]
            found = values(model, [state.new, write])
            assert torch.equal(found[write][:, :, PAST], found[state.new][:, :, 0])


def test_a_full_window_is_rolled_before_it_is_written():
    model = later_view("mistral", static=True)
    assert [site.index for site in model.caches] == [0, 1]
    for layer in model.layers:
        assert layer.cache.kind == "in-place"
        for state in states(layer):
            assert state.past is state.kept is state.attended
            (write,) = [u for u in state.past.users if op_name(u) == "copy_"]
            found = values(model, [state.new, write])
            assert found[write].shape[2] == WINDOW
            assert torch.equal(found[write][:, :, -1:], found[state.new])


def test_cross_attention_reads_what_the_first_call_wrote():
    own, cross = later_decoder_view("bart").caches
    assert (own.kind, cross.kind) == ("concat", "read")
    for state in (cross.key, cross.value):
        assert state.new is None
        assert state.kept is None
        assert state.past is state.attended
        assert state.past.op == "placeholder"


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_encoders_have_none(name):
    model = view(name)
    assert model.caches == []
    assert all(layer.cache is None for layer in model.layers)


def test_prefill_without_a_cache():
    assert view("llama", use_cache=False).caches == []


def test_encoder_and_cross_attention():
    model = view("bart")
    assert [site.index for site in model.caches] == [1, 2]
    own, cross = model.caches
    found = values(model, [own.key.new, cross.key.new])
    assert found[own.key.new].shape[2] == 5
    assert found[cross.key.new].shape[2] == LENGTH


def test_static_shapes():
    for site in view("llama", dynamic=False).caches:
        assert sizes_of(site.key.kept) == (2, 4 // 2, LENGTH, 16)


def test_a_learned_prefix_is_no_cache():
    copy = copy_module(later_view("llama").gm)
    first, second = find_caches(copy, ModelGraph(copy).attention)
    with copy.graph.inserting_before(first.key.attended):
        prefix = copy.graph.call_function(torch.relu, (first.key.past,))
    prefix.meta["example_value"] = first.key.past.meta["example_value"]
    first.key.attended.replace_input_with(first.key.past, prefix)
    model = ModelGraph(copy)
    assert [site.index for site in model.caches] == [second.index]
    assert model.layers[0].cache is None


def test_a_cache_that_nothing_reads_is_reported():
    copy = copy_module(later_view("llama").gm)
    (first, _) = find_caches(copy, ModelGraph(copy).attention)
    attention = ModelGraph(copy).attention[0].node
    attention.replace_input_with(first.key.attended, first.key.new)
    attention.replace_input_with(first.value.attended, first.value.new)
    rows = ModelGraph(copy).missed()
    assert [row[:2] for row in rows] == [("graph", "no-cache")]
    assert first.key.past.name in rows[0][2]
