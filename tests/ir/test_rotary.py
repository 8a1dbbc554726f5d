"""Rotary sites of real models: forms, rotated channels, cos and sin, positions."""

from __future__ import annotations

import pytest
import torch

from graphopt.ir.caches.sites import find_caches
from graphopt.ir.copying import copy_module
from graphopt.ir.match import op_name, sizes_of
from graphopt.ir.model_graph import ModelGraph
from tests.ir.views import LENGTH, PAST, later_view, static_prefill_view, values, view

# Form and rotated channels; heads have 16 channels.
ROTARY = {
    "llama": ("half", 16), "gemma3": ("half", 16), "phi3": ("half", 16),
    "mixtral": ("half", 16), "falcon": ("half", 16), "granite": ("half", 16),
    "gpt_oss": ("half", 16), "gpt_neox": ("half", 4),
    "gptj": ("interleaved", 8), "cohere": ("interleaved", 16),
}  # fmt: skip
HALF_TABLES = ("gpt_oss", "gptj")  # cos and sin hold each angle once


@pytest.mark.parametrize("name", ROTARY)
def test_prefill(name):
    model = view(name)
    assert [site.index for site in model.rotary] == [0, 1]
    for layer in model.layers:
        site = layer.rotary
        assert (site.form, site.rotary_dim) == ROTARY[name]
        assert (site.key.form, site.key.rotary_dim) == ROTARY[name]
        assert sizes_of(site.query.output) == sizes_of(site.query.input)
        assert sizes_of(site.key.output) == sizes_of(site.key.input)
        assert site.positions.source == "arange"
        assert sizes_of(site.positions.node) == (1, model.token_symbol)
        width = site.rotary_dim // 2 if name in HALF_TABLES else site.rotary_dim
        assert (
            sizes_of(site.cos) == sizes_of(site.sin) == (1, model.token_symbol, width)
        )


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt_neox", "gpt_oss"])
def test_rotated_query_and_key_are_those_of_attention(name):
    for layer in view(name).layers:
        assert layer.rotary.query.output is layer.attention.query
        assert layer.rotary.key.output is layer.cache.key.new


def test_rotation_before_the_heads_are_moved():
    for layer in view("gptj").layers:
        assert sizes_of(layer.rotary.query.output)[2:] == (4, 16)
        assert sizes_of(layer.attention.query)[1:] == (4, view("gptj").token_symbol, 16)


def test_layers_share_cos_and_sin():
    first, second = view("llama").rotary
    assert first.cos is second.cos
    assert first.sin is second.sin
    assert first.cos is not first.sin
    assert first.positions == second.positions


def test_local_and_global_layers_have_tables_of_their_own():
    first, second = view("gemma3").rotary
    assert first.cos is not second.cos
    assert first.positions == second.positions


@pytest.mark.parametrize("name", ["gpt2", "opt", "bert", "vit", "bart"])
def test_models_without_rotary(name):
    model = view(name)
    assert model.rotary == []
    assert all(layer.rotary is None for layer in model.layers)
    assert not [row for row in model.missed() if row[1] == "no-rotary"]


def test_positions_that_the_caller_gives():
    positions = torch.arange(3, 3 + LENGTH).expand(2, -1)
    model = view("llama", position_ids=positions)
    for site in model.rotary:
        assert site.positions.source == "input"
        assert site.positions.node.op == "placeholder"
        found = values(model, [site.positions.node])
        assert torch.equal(found[site.positions.node], positions)


@pytest.mark.parametrize(
    ("name", "tokens"), [("llama", 1), ("gemma3", 1), ("llama", 5)]
)
def test_later_calls_rotate_the_new_tokens(name, tokens):
    model = later_view(name, tokens)
    for layer in model.layers:
        site = layer.rotary
        assert site.positions.source == "arange"
        assert site.key.output is layer.cache.key.new
        found = values(model, [site.positions.node])[site.positions.node]
        assert found.tolist() == [list(range(PAST, PAST + tokens))]


def test_positions_of_a_static_cache():
    model = static_prefill_view("llama")
    for layer in model.layers:
        assert layer.rotary.positions.source == "arange"
        assert layer.rotary.key.output is layer.cache.key.new


def test_static_shapes():
    for site in view("llama", dynamic=False).rotary:
        assert (site.form, site.rotary_dim) == ("half", 16)
        assert sizes_of(site.positions.node) == (1, LENGTH)


def rotated(x, form, dim, base):
    """Return ``x`` with its pairs of channels turned by position times frequency."""
    axis = x.shape.index(LENGTH)
    turned, passed = x[..., :dim].double(), x[..., dim:]
    pairs = (
        torch.stack(turned.chunk(2, -1), -1)
        if form == "half"
        else turned.unflatten(-1, (-1, 2))
    )
    frequencies = base ** (-torch.arange(0, dim, 2, dtype=torch.float64) / dim)
    angles = torch.arange(LENGTH, dtype=torch.float64)[:, None] * frequencies
    if axis == 1:  # the heads come after the tokens
        angles = angles[:, None]
    turn = torch.polar(torch.ones_like(angles), angles)
    result = torch.view_as_real(torch.view_as_complex(pairs.contiguous()) * turn)
    channels = result.transpose(-1, -2) if form == "half" else result
    return torch.cat([channels.flatten(-2).to(x.dtype), passed], -1)


@pytest.mark.parametrize("name", ["llama", "gpt_neox", "gptj", "cohere"])
def test_values_are_turned_by_their_positions(name):
    model = view(name)
    sites = [part for site in model.rotary for part in (site.query, site.key)]
    found = values(model, [node for s in sites for node in (s.input, s.output)])
    for site in sites:
        base = 500000.0 if name == "cohere" else 10000.0
        expected = rotated(found[site.input], site.form, site.rotary_dim, base)
        torch.testing.assert_close(found[site.output], expected, atol=1e-5, rtol=1e-5)
        assert not torch.equal(found[site.output], found[site.input])


def test_cos_and_sin_are_told_apart():
    model = view("llama")
    (site, _) = model.rotary
    found = values(model, [site.cos, site.sin])
    assert torch.equal(found[site.cos][0, 0], torch.ones(16))
    assert torch.equal(found[site.sin][0, 0], torch.zeros(16))


def changed(name, old, new):
    """Return a view of a graph in which every operator ``old`` is ``new``."""
    copy = copy_module(view(name).gm)
    for node in copy.graph.nodes:
        if op_name(node) == old:
            node.target = new
    return ModelGraph(copy)


@pytest.mark.parametrize("new", [torch.abs, torch.relu])
def test_what_only_looks_like_a_rotation_is_none(new):
    model = changed("llama", "neg", new)
    assert model.rotary == []
    assert [row[:2] for row in model.missed()] == [("graph", "no-rotary")]


def test_a_rotation_of_another_tensor_is_none():
    copy = copy_module(view("llama").gm)
    first, _ = ModelGraph(copy).rotary
    product = next(u for u in first.query.input.users if op_name(u) == "mul")
    product.replace_input_with(
        first.query.input, ModelGraph(copy).layers[0].cache.value.new
    )
    assert [site.index for site in ModelGraph(copy).rotary] == [1]
    assert len(find_caches(copy, ModelGraph(copy).attention)) == 2
