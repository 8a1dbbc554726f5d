"""`neuron-mask` against eager models whose other neurons are zero."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

import graphopt
from graphopt.errors import ConfigError
from graphopt.ir.match import op_name
from graphopt.ir.model_graph import ModelGraph
from graphopt.passes.base import PassContext
from graphopt.passes.ffn.neuron_mask import NeuronMask
from graphopt.passes.ffn.options import middle_layers
from graphopt.passes.linear.onednn_linear import OneDnnLinear
from graphopt.runtime.neurons.clusters import Clusters
from tests.models import TINY, capture, padding_mask, token_ids
from tests.passes.neuron_oracle import decoded, masked, shallow, steps
from tests.rewriting import rewritten, traced

DENSE = "structured-mask"
LEAST = 10  # tokens of a prompt that is masked
STEPS = 4


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    """`rewritten` sees to it; what `serving` traced serves all its tests."""


def config(options="", layers=(0,)):
    given = ",".join(filter(None, (options, f"layers={list(layers)}")))
    given = given if "min_tokens" in given else f"{given},min_tokens={LEAST}"
    return f"structured-mask,neuron-mask{{{given}}}"


def new_cache(model, text, **options):
    return graphopt.Cache.from_config(text, model, max_tokens=128, **options)


def inputs(batch=1, tokens=20, seed=0):
    ids, forced = token_ids(batch, tokens, seed), token_ids(batch, STEPS, seed + 1)
    return ids, torch.ones_like(ids), forced


def wanted(model, ids, mask, forced, layers=(0,), chunk=None, **rule):
    """The oracle's logits, which are not the dense model's."""
    given = (model, ids, mask, forced)
    dense = decoded(*given, DynamicCache(), chunk=chunk)
    with masked(model, layers, mask.bool(), **rule):
        expected = decoded(*given, DynamicCache(), chunk=chunk)
    assert torch.equal(expected[:, 0], dense[:, 0])
    assert (expected - dense).abs().max() > 1e-3
    return expected


def check(model, text, rule, given, chunk=None):
    """Compare the rewritten model's logits with the oracle's; return the cache."""
    expected = wanted(model, *given, chunk=chunk, **rule)
    cache = new_cache(model, text)
    actual = decoded(rewritten(model, text), *given, cache, chunk=chunk)
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=2e-5)
    return cache


class Serving:
    """A model whose two graphs, of prompts and of steps, serve several tests."""

    def __init__(self):
        self.model, self.reports = TINY["llama"](), []
        self.text = config(layers=(0, 1))
        self.fast = rewritten(self.model, self.text, reports=self.reports)

    def cache(self):
        return new_cache(self.model, self.text)


@pytest.fixture(scope="module")
def serving():
    return Serving()


def test_decodes_on_the_prompts_neurons(serving):
    expected = wanted(serving.model, *inputs(), layers=(0, 1))
    actual = decoded(serving.fast, *inputs(), serving.cache())
    torch.testing.assert_close(actual, expected, atol=2e-5, rtol=2e-5)
    for report, word in zip(serving.reports, ("chooses", "computes"), strict=True):
        found = [r for r in report.all_remarks() if r.pass_name == "neuron-mask"]
        done = [r for r in found if r.kind == "applied"]
        assert len(done) == 2
        assert all(r.message.startswith(f"{word} 64 of 128 neurons") for r in done)


def test_generations_do_not_disturb_each_other(serving):
    def start():
        for tokens in (20, 33):
            given = inputs(tokens=tokens, seed=tokens)
            yield steps(serving.fast, *given, serving.cache())

    alone = [list(one) for one in start()]
    beside = zip(*zip(*start(), strict=True), strict=True)
    for one, other in zip(alone, beside, strict=True):
        assert all(map(torch.equal, one, other))
    assert len(serving.reports) == 2  # for all prompts and caches


def test_short_prompts_decode_densely(serving):
    given, before = inputs(tokens=LEAST - 1), len(serving.reports)
    actual = decoded(serving.fast, *given, serving.cache())
    dense = decoded(serving.model, *given, DynamicCache())
    torch.testing.assert_close(actual, dense, atol=2e-5, rtol=2e-5)
    (step,) = serving.reports[before:]  # prompts of all lengths have one graph
    (record,) = (r for r in step.records if r.name == "neuron-mask")
    assert not record.changed
    assert "neurons" not in record.before  # it is the graph of a model without the pass
    assert [r.code for r in record.remarks] == ["cache"]


def test_a_cache_that_is_reset_keeps_its_buffers_where_they_are(serving):
    cache, found, places = serving.cache(), [], []
    for seed in (5, 7, 5):
        found.append(decoded(serving.fast, *inputs(seed=seed), cache))
        places.append([t.data_ptr() for t in cache.neurons.tensors()])
        cache.reset()
    assert torch.equal(found[0], found[2])
    assert not torch.equal(found[0], found[1])
    assert places[0] == places[1] == places[2]


def test_a_prompt_that_was_not_counted_is_an_error(serving):
    models = iter((serving.model, serving.fast))
    found = steps(lambda *a, **k: next(models)(*a, **k), *inputs(), serving.cache())
    next(found)
    with pytest.raises(RuntimeError, match="no neurons were chosen"):
        next(found)


@pytest.mark.parametrize(("name", "rows"), [("phi3", "union"), ("gpt2", "each")])
def test_batches_with_padding(name, rows):
    ids, _, forced = inputs(2)
    given = (ids, padding_mask([20, 13], 20), forced)
    text = config(f"rows={rows},force=true")
    cache = check(shallow(name), text, {"each": rows == "each"}, given)
    first = cache.neurons.layers[0]
    assert len(first.indices) == (2 if rows == "each" else 1)
    assert first.up.ndim == (3 if rows == "each" else 2)


def test_options_chunks_of_a_prompt_and_refreshed_neurons():
    text = config("keep=0.2,token_ratio=0.5,criterion=signed,refresh=2")
    rule = {"keep": 0.2, "ratio": 0.5, "absolute": False, "refresh": 2}
    check(shallow("llama"), text, rule, inputs(), chunk=12)


def test_beams_of_a_network_gated_by_gelu():
    model, ids = shallow("gemma3"), token_ids(2, 13)
    text = config("rows=each,force=true")
    asked = {"max_new_tokens": 6, "num_beams": 3, "do_sample": False}
    with masked(model, (0,), torch.ones(6, 13).bool(), each=True):
        expected = model.generate(ids, **asked)
    fast, cache = rewritten(model, text), new_cache(model, text)
    assert torch.equal(fast.generate(ids, **asked, past_key_values=cache), expected)


def traced_steps():
    """A host that leaves the first graph, of the prompt, as it is."""
    graphs = []

    def host(gm, given):
        graphs.append(gm)
        return gm if len(graphs) == 1 else traced(gm, given)

    return host


def test_all_neurons_are_the_dense_model_to_the_bit():
    model, text, reports = shallow("llama"), config("keep=1.0,force=true"), []
    dense = rewritten(model, DENSE, host=traced_steps())
    expected = decoded(dense, *inputs(), graphopt.Cache(max_tokens=128))
    fast = rewritten(model, text, host=traced_steps(), reports=reports)
    assert torch.equal(decoded(fast, *inputs(), new_cache(model, text)), expected)
    assert any(r.kind == "applied" for r in reports[1].all_remarks())
    assert new_cache(model, config("keep=1.0")).neurons is None


def graphs(name, text, batch=1, dynamic=True):
    """A model's graphs of a prompt and of a step, with the cache of a config."""
    model = shallow(name)
    cache = new_cache(model, text)
    for tokens in (20, 1):
        given = {"input_ids": token_ids(batch, tokens), "past_key_values": cache}
        yield from capture(model, dynamic=dynamic, logits_to_keep=1, **given)


def codes(graph, **options):
    result = NeuronMask(**options).run(ModelGraph(graph), PassContext())
    assert result.changed == any(r.kind == "applied" for r in result.remarks)
    return [r.code for r in result.remarks]


def test_refusals():
    prefill, step = graphs("llama", config("rows=each"), 3, dynamic=False)
    assert codes(prefill, keep=0.3) == ["cache", "memory"]
    assert codes(prefill, keep=1.0) == ["keeps-all"]
    assert codes(prefill, keep=0.4) == ["rewritten", "memory"]
    assert codes(prefill, keep=0.4) == ["cache"]  # nothing is left to do
    assert codes(step, keep=0.4) == ["slower"]
    assert codes(step, keep=0.4, force=True) == ["rewritten"]


def test_the_nearest_cluster_is_chosen(tmp_path):
    path = tmp_path / "clusters.toml"
    Clusters({0: torch.rand(2, 128)}).write(path)
    options = {"mode": "similarity", "clusters": str(path), "layers": [0]}
    text = {"defaults": False, "pass": [{"name": "neuron-mask", **options}]}
    prefill = next(graphs("llama", text))
    assert codes(prefill) == ["cache", "memory"]
    assert codes(prefill, **options) == ["rewritten", "memory"]
    found = [op_name(node) for node in prefill.graph.nodes]
    assert "graphopt.nearest_neurons" in found
    assert "graphopt.choose_neurons" not in found


def test_prompts_on_weights_laid_out_for_onednn_are_counted():
    prefill = next(graphs("llama", config()))
    OneDnnLinear(force=True).run(ModelGraph(prefill), PassContext())
    found = [op_name(node) for node in prefill.graph.nodes]
    assert "graphopt.onednn_linear" in found
    assert codes(prefill) == ["rewritten", "memory"]


def test_caches_that_cannot_be_made():
    model = TINY["llama"]()
    with pytest.raises(ConfigError, match=r"masks neurons.*model=\.\.\."):
        graphopt.Cache.from_config(config())
    with pytest.raises(ConfigError, match="layer 7 has no feed-forward network"):
        new_cache(model, config(layers=(7,)))
    with pytest.raises(ConfigError, match="layer 0 has no feed-forward network"):
        new_cache(TINY["mixtral"](), config())
    with pytest.raises(ConfigError, match="belong together"):
        new_cache(model, "neuron-mask{mode=similarity}")
    with pytest.raises(ConfigError, match="not written"):
        cache = new_cache(model, config())
        with torch.no_grad():
            model(token_ids(1, 3), past_key_values=cache)
        cache.save("nowhere")


def test_the_middle_layers():
    assert middle_layers(32) == tuple(range(6, 27))
    assert middle_layers(30) == tuple(range(6, 25))
    assert middle_layers(4) == (1, 2)


@pytest.mark.parametrize("tokens", [24, 1])
def test_graph_diffs(graph_diff, tokens):
    model, text = TINY["llama"](), config("keep=0.25", layers=(0, 1))
    cache = new_cache(model, text)
    given = {"logits_to_keep": 1, "past_key_values": cache}
    past = 24 if tokens == 1 else 0
    if past:
        with torch.no_grad():
            model(token_ids(2, past), **given)
    mask = padding_mask([past + tokens, past + tokens - 7 + past // 4], past + tokens)
    given |= {"input_ids": token_ids(2, tokens), "attention_mask": mask}
    name = "neuron-mask-prefill" if tokens > 1 else "neuron-mask-decode"
    shown = graph_diff(model, text, name, layer=1, **given)
    word = "chooses" if tokens > 1 else "computes"
    assert f"{word} 32 of 128 neurons" in shown
