"""`neuron-mask` with int8 buffers, against models whose weights the codes stand for."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

import graphopt
from graphopt.ir.match import op_name
from graphopt.ir.model_graph import ModelGraph
from graphopt.passes.base import PassContext
from graphopt.passes.ffn.neuron_mask import NeuronMask
from tests.models import capture, token_ids
from tests.passes.neuron_codes import decoded_in_codes
from tests.passes.neuron_oracle import decoded, masked, shallow
from tests.rewriting import rewritten


def text(options=""):
    given = f"layers=[0],min_tokens=10,buffers=int8{options}"
    return f"structured-mask,neuron-mask{{{given}}}"


def inputs(batch=1):
    ids, forced = token_ids(batch, 20), token_ids(batch, 4, 1)
    return ids, torch.ones_like(ids), forced


def new_cache(model, config):
    return graphopt.Cache.from_config(config, model, max_tokens=128)


def test_decodes_with_the_weights_that_codes_stand_for():
    model, given = shallow("phi3"), inputs()
    cache = new_cache(model, text())
    actual = decoded(rewritten(model, text()), *given, cache)
    expected = decoded_in_codes(model, given, 0, model, "int8")
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=2e-5)
    with masked(model, (0,), given[1].bool()):
        wide = decoded(model, *given, DynamicCache())
    assert 0 < (actual - wide)[:, 1:].norm() / wide[:, 1:].norm() < 0.01
    first = cache.neurons.layers[0]
    assert first.up.dtype == first.down.dtype == torch.int8


def test_rows_have_codes_of_their_own():
    model, given = shallow("gpt2"), inputs(2)
    rows = zip(*(x.split(1) for x in given), strict=True)
    alone = [decoded_in_codes(model, row, 0, model, "int8") for row in rows]
    config = text(",rows=each,force=true")
    cache = new_cache(model, config)
    actual = decoded(rewritten(model, config), *given, cache)
    torch.testing.assert_close(actual, torch.cat(alone), atol=2e-5, rtol=2e-5)
    first = cache.neurons.layers[0]
    assert first.up.ndim == 3 and first.up_scales.shape == first.up.shape[:2]
    assert not torch.equal(*first.indices)
    swapped = [t.flip(0) for t in cache.neurons.tensors()]
    cache.neurons.select(torch.tensor([1, 0]))
    assert all(map(torch.equal, cache.neurons.tensors(), swapped))


def test_what_is_read_is_told_in_bytes_of_codes():
    model, config = shallow("llama"), text(",keep=0.5,rows=each")
    cache, rows, found = new_cache(model, config), 3, []
    for tokens in (20, 1):
        given = {"input_ids": token_ids(rows, tokens), "past_key_values": cache}
        found += capture(model, dynamic=False, logits_to_keep=1, **given)
    prefill, step = found

    def run(graph, buffers="int8"):
        item = NeuronMask(buffers=buffers, keep=0.5, rows="each")
        return item.run(ModelGraph(graph), PassContext()).remarks

    assert [r.code for r in run(prefill, "float")] == ["cache", "memory"]
    _, memory = run(prefill)
    kept, width, neurons = 64, 64, 128
    read = 3 * kept * width + 4 * (2 * kept + width)
    held = rows * (read + 4 * neurons + 8 * kept)
    assert memory.figures["mb"] == pytest.approx(held / 1e6)
    assert held == sum(t.nbytes for t in cache.neurons.tensors())
    assert "int8 buffers" in memory.message
    (used,) = run(step)  # in float three halves are slower than the whole
    assert used.figures["mb"] == pytest.approx(rows * read / 1e6)
    assert used.figures["mb_before"] == pytest.approx(12 * neurons * width / 1e6)
    names = [op_name(node) for node in step.graph.nodes]
    assert names.count("graphopt.row_linear") == 3
