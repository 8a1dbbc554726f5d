"""What a decoding step has to read, counted on a model of two layers."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

from benchmarks import neuron_mask_bytes as read
from benchmarks.neuron_mask_prompts import perplexity
from graphopt.calibration.levels import Levels
from graphopt.remarks import applied, missed
from graphopt.runtime.cache import Cache

LAYER = {
    "self_attn.q_proj": 64 * 64,
    "self_attn.k_proj": 32 * 64,
    "self_attn.v_proj": 32 * 64,
    "self_attn.o_proj": 64 * 64,
    "mlp.gate_proj": 128 * 64,
    "mlp.up_proj": 128 * 64,
    "mlp.down_proj": 64 * 128,
}
FFN = 3 * 128 * 64


@pytest.fixture(scope="module")
def model():
    config = tf.LlamaConfig(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=100,
    )
    return tf.LlamaForCausalLM(config).eval()


def named(remark):
    return type(remark)(**{**remark.as_dict(), "pass_name": "neuron-mask"})


def test_dense_steps_read_every_weight_but_the_embedding(model):
    linears = read.linear_bytes(model, codes=False)
    assert sum(linears.values()) == 4 * (2 * sum(LAYER.values()) + 100 * 64)
    embedding = model.model.embed_tokens.weight.nbytes
    whole = sum(p.nbytes for p in model.parameters()) - embedding
    assert sum(linears.values()) + read.other_bytes(model) == whole


def test_codes_have_a_scale_an_output(model):
    linears = read.linear_bytes(model, codes=True)
    assert linears["model.layers.0.mlp.down_proj.weight"] == 64 * 128 + 4 * 64
    assert linears["lm_head.weight"] == 100 * 64 + 4 * 100


@pytest.mark.parametrize(("buffers", "each"), [("float", 4.0), ("int8", 1.0)])
def test_core_neurons_are_read_in_the_place_of_the_ffn(model, buffers, each):
    config = f"neuron-mask{{keep=0.5,layers=[1],buffers={buffers}}}"
    cache = Cache.from_config(config, model, max_tokens=64)
    dense = read.linear_bytes(model, codes=False)
    found = read.without_core(dense, model, cache)
    scales = 4 * (64 + 64 + 64) if buffers == "int8" else 0
    saved = 4 * FFN - each * FFN / 2 - scales
    assert sum(dense.values()) - sum(found.values()) == saved
    assert found["model.layers.0.mlp.up_proj.weight"] == 4 * 128 * 64


def test_levels_count_only_where_teal_was_applied(model):
    dense = read.linear_bytes(model, codes=False)
    levels = Levels(0.5, dict.fromkeys(dense, 0.25))
    remarks = [
        applied("layer[0].linear[6]", "leaves out"),
        missed("layer[1].linear[1]", "slower", "small"),
    ]
    found = read.without_small(dense, levels, map(named, remarks))
    assert sum(dense.values()) - sum(found.values()) == 4 * 64 * 128 / 4


def test_cats_reads_less_of_up_and_down(model):
    dense = read.linear_bytes(model, codes=False)
    remarks = [named(applied("layer[1].ffn[0]", "leaves out"))]
    found = read.without_closed(dense, 0.5, remarks)
    assert sum(dense.values()) - sum(found.values()) == 4 * (2 * FFN / 3) / 2
    assert found["model.layers.1.mlp.gate_proj.weight"] == 4 * 128 * 64


def test_keys_and_values_are_counted_with_their_scales(model):
    assert read.kv_bytes(model.config, 10, codes=False) == 2 * 2 * 2 * 10 * 4 * 16
    assert read.kv_bytes(model.config, 10, codes=True) == 2 * 2 * 2 * 10 * (16 + 4)


def test_perplexity_of_a_guess_among_all_words():
    following = torch.randint(50, (7,))
    assert perplexity(torch.zeros(7, 50), following) == pytest.approx(50.0)
