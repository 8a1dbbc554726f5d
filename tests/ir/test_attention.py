"""Attention sites of real models: which are found, and as what."""

from __future__ import annotations

import pytest
import torch
from torch.nn import functional as F

from graphopt.ir.constants import fold_float_attributes
from graphopt.ir.model_graph import ModelGraph
from tests.models import (
    CAUSAL,
    TINY,
    WINDOW,
    capture,
    padding_mask,
    prefilled,
    token_ids,
)

WINDOWED = {"mistral": (0, 1), "gemma2": (0,), "gemma3": (0,)}
SOFTCAPPED = ("gemma2",)
GROUPED = ("llama", "qwen2", "qwen3", "mistral", "gemma2", "gemma3", "phi3", "mixtral")
RAISED = tuple(n for n in CAUSAL if n not in ("bloom", "gpt_oss"))

# The others run transformers' code for llama.
OWN_EAGER = ("llama", "mistral", "gemma2", "gpt2", "opt", "gpt_neox", "falcon")


def graph(name, implementation="sdpa", **inputs):
    model = TINY[name]()
    if implementation == "eager":
        model.set_attn_implementation("eager")
    graphs = capture(model, **inputs)
    assert len(graphs) == 1
    fold_float_attributes(graphs[0])
    return ModelGraph(graphs[0])


def assert_causal(model, name, masked):
    assert len(model.attention) == 2
    for site in model.attention:
        windowed = site.index in WINDOWED.get(name, ())
        assert site.unsupported is None
        assert site.pattern == ("sliding-window" if windowed else "causal")
        assert site.window == (WINDOW if windowed else 0)
        assert (site.key_mask is not None) == masked
        assert site.num_heads == 4
        if name in GROUPED:
            assert site.num_kv_heads == 2
        assert site.softcap == (50.0 if name in SOFTCAPPED else 0.0)


@pytest.mark.parametrize(
    ("implementation", "name"),
    [*(("sdpa", n) for n in RAISED), *(("eager", n) for n in OWN_EAGER)],
)
def test_prefill(name, implementation):
    model = graph(name, implementation, input_ids=token_ids(2, 20), use_cache=True)
    assert_causal(model, name, masked=False)
    assert model.kind == "prefill"


# The golden diffs of `structured-mask` show it of every model.
@pytest.mark.parametrize("name", ["llama", "gemma2", "opt", "falcon"])
def test_padded_prefill_without_a_cache(name):
    mask = padding_mask([20, 11], 20)
    inputs = {"input_ids": token_ids(2, 20), "attention_mask": mask}
    assert_causal(graph(name, **inputs, use_cache=False), name, masked=True)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_decode(name):
    model = TINY[name]()
    cache = prefilled(model, token_ids(1, 20))
    inputs = {"input_ids": token_ids(1, 1), "past_key_values": cache}
    graphs = capture(model, **inputs)
    fold_float_attributes(graphs[0])
    view = ModelGraph(graphs[0])
    assert view.kind == "decode"
    assert len(view.attention) == 2


def test_key_and_value_lengths_may_be_symbols_of_their_own():
    q = torch.randn(1, 4, 1, 16)
    k, v = (torch.randn(1, 2, 9, 16) for _ in range(2))
    for tensor in (k, v):
        torch._dynamo.mark_dynamic(tensor, 2)

    class Attention(torch.nn.Module):
        def forward(self, q, k, v):
            return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    gm = capture(Attention(), dynamic=None, q=q, k=k, v=v)[0]
    site = ModelGraph(gm).attention[0]
    lengths = {str(t.meta["example_value"].shape[2]) for t in (site.key, site.value)}
    assert len(lengths) == 2
    assert site.unsupported is None


def test_sinks_are_refused():
    sites = graph("gpt_oss", input_ids=token_ids(1, 20)).attention
    assert [s.unsupported for s in sites] == ["attention sinks"] * 2


def test_what_is_not_raised_is_reported():
    rows = graph("bloom", input_ids=token_ids(1, 20)).missed()
    assert rows[0][:2] == ("graph", "no-attention")
    assert [code for _, code, _ in rows[1:]] == ["not-raised"] * 2


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_encoders(name):
    import torch

    inputs = {"input_ids": token_ids(1, 20)}
    if name == "vit":
        inputs = {"pixel_values": torch.randn(1, 3, 32, 32)}
    view = graph(name, **inputs)
    assert [s.pattern for s in view.attention] == ["full", "full"]
    assert view.kind == "encoder"


@pytest.mark.parametrize(
    ("name", "kind", "activation"),
    [
        ("llama", "gated", "silu"),
        ("gemma3", "gated", "gelu"),
        ("phi3", "gated", "silu"),
        ("gpt2", "plain", "gelu"),
        ("opt", "plain", "relu"),
        ("gpt_neox", "plain", "gelu"),
        ("falcon", "plain", "gelu"),
    ],
)
def test_feed_forward_sites(name, kind, activation):
    view = graph(name, input_ids=token_ids(1, 20))
    assert [(f.form, f.activation) for f in view.ffn] == [(kind, activation)] * 2
    assert len(view.layers) == 2
    assert all(len(layer.ffn) == 1 for layer in view.layers)


@pytest.mark.parametrize(("name", "count"), [("llama", 5), ("gpt2", 5), ("gemma3", 13)])
def test_norms(name, count):
    assert len(graph(name, input_ids=token_ids(1, 20)).norms) == count


def test_the_token_symbol():
    view = graph("llama", input_ids=token_ids(1, 20))
    assert view.token_symbol is not None
    fixed = graph("llama", dynamic=False, input_ids=token_ids(1, 20))
    assert str(fixed.token_symbol) == "T"
    assert fixed.tokens == 20
