"""Layers compiled once and called many times, without a changed bit."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

import graphopt
from graphopt.backend import last_reports
from graphopt.outline import compile_outlined
from graphopt.outline.lookups import find_lookups
from tests.models import token_ids
from tests.rewriting import by_pieces, rewritten

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
}


def llama():
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(tf.LlamaConfig(**SIZES)).eval()


def gemma3():
    torch.manual_seed(0)
    kinds = ["sliding_attention", "full_attention"]
    sizes = {**SIZES, "head_dim": 16, "sliding_window": 8, "layer_types": kinds * 2}
    return tf.Gemma3ForCausalLM(tf.Gemma3TextConfig(**sizes)).eval()


@torch.no_grad()
def logits(model, outline, ids, **inputs):
    torch._dynamo.reset()
    options = {"outline": outline, "config": ""}
    fast = torch.compile(model, backend="graphopt", dynamic=True, options=options)
    return fast(ids, **inputs)


def test_bit_identical():
    model, ids = llama(), token_ids(2, 21)
    whole = logits(model, False, ids, use_cache=True)
    parts = logits(model, True, ids, use_cache=True)
    assert torch.equal(whole.logits, parts.logits)
    remark = next(r for r in last_reports()[-1].remarks if r.site == "layers")
    assert remark.kind == "applied"
    assert remark.figures["kinds"] < remark.figures["layers"] == 4
    for layer in range(4):
        assert torch.equal(
            whole.past_key_values.layers[layer].keys,
            parts.past_key_values.layers[layer].keys,
        )


def test_pieces_get_the_strides_that_dynamo_saw():
    """Phi 3 joins rotated channels to none; Inductor keeps their strides, eager not."""
    torch.manual_seed(0)
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    model = tf.Phi3ForCausalLM(tf.Phi3Config(**SIZES, **tokens)).eval()
    ids = token_ids(2, 21)
    caches = [graphopt.Cache(max_tokens=64) for _ in range(2)]
    whole, parts = (
        logits(model, outline, ids, past_key_values=cache).logits
        for outline, cache in zip((False, True), caches, strict=True)
    )
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-5)


def test_layers_of_two_masks():
    model, ids = gemma3(), token_ids(1, 21)
    whole = logits(model, False, ids, use_cache=False).logits
    parts = logits(model, True, ids, use_cache=False).logits
    # Norms stand on both sides of a cut; how they are fused moves the last bit.
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-5)
    remark = next(r for r in last_reports()[-1].remarks if r.site == "layers")
    # Sliding and full layers run the same operators, each on its own mask.
    assert remark.figures == {"layers": 4, "kinds": 1}


def test_layers_that_differ_are_left_whole():
    class Odd(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.parts = torch.nn.ModuleList(torch.nn.Linear(8, 8) for _ in range(2))

        def forward(self, x):
            for part in self.parts:
                x = part(x).relu()
            return x

    model, x = Odd(), torch.randn(3, 8)
    torch.testing.assert_close(torch.compile(model, backend="graphopt")(x), model(x))
    remark = next(r for r in last_reports()[-1].remarks if r.site == "layers")
    assert (remark.kind, remark.code) == ("missed", "not-outlined")


def test_gradients_flow_through_the_pieces():
    model, ids = llama(), token_ids(1, 12)
    model(ids, use_cache=False).logits.square().mean().backward()
    expected = {n: p.grad.clone() for n, p in model.named_parameters()}
    model.zero_grad()
    fast = rewritten(model, "", host=by_pieces)
    fast(ids, use_cache=False).logits.square().mean().backward()
    for name, parameter in fast.named_parameters():
        torch.testing.assert_close(parameter.grad, expected[name], atol=1e-6, rtol=1e-3)


@pytest.mark.parametrize("together", [1, 2])
def test_lookups_run_before_the_pieces(together):
    """Codes of all weights come from a plain call, not through a compiled piece."""
    model, ids = llama(), torch.ones(1, 1, dtype=torch.long)
    config = "shadow-outlier{activations=float,weights=memory}"
    found = []

    def host(gm, _):
        outlined = compile_outlined(gm, lambda piece, _: piece, together)
        found.append((find_lookups(gm.graph.nodes), outlined))
        return outlined.run

    with torch.no_grad():
        actual = rewritten(model, config, host=host)(ids).logits
        expected = rewritten(model, config)(ids).logits
    assert torch.equal(actual, expected)
    ((lookups, outlined),) = found
    assert outlined.kinds == 1 and len(lookups) == 1
    assert "= lookup0((" in outlined.source
    assert outlined.source.count("= piece") == 2 + 4 // together
    assert len(lookups[0].items) == 2 * 7 * 4


def test_pieces_of_many_layers_are_not_alike():
    model, ids, found = llama(), torch.ones(1, 3, dtype=torch.long), []

    def host(gm, _):
        found.append(compile_outlined(gm, lambda piece, _: piece, 3))
        return gm

    rewritten(model, "", host=host)(ids)
    assert found[0].run is None
    assert "2 pieces of 3 layers are of 2 kinds" in found[0].reason
