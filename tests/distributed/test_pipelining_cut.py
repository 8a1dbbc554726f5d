"""Parts of a graph, one after the other, give what the whole graph gives."""

from __future__ import annotations

import pytest
import torch
from torch import fx

from graphopt.config import load_config
from graphopt.errors import ModelError
from graphopt.integrations.pipelining.cut import bounds, cut, mark_stages
from graphopt.integrations.pipelining.members import Members
from graphopt.integrations.pipelining.sizes import Sizes
from graphopt.pipeline import run_passes
from tests.models import TINY, capture, token_ids


def graph_of(name, length=24, **inputs):
    ids = token_ids(1, length)
    (gm,) = capture(TINY[name](), input_ids=ids, use_cache=False, **inputs)
    return gm


@torch.no_grad()
def chained(gm, parts):
    """Run the parts in order; return the results, each from whoever computed it."""
    arguments = gm.meta["arguments"]
    received, results = (), {}
    values = Sizes(gm).of(arguments)
    for part in parts:
        expected = [values(node).shape for node in part.received]
        assert [tuple(x.shape) for x in received] == expected
        found = part.module(*(arguments[i] for i in part.inputs), *received)
        received = found[: len(part.sent)]
        own = found[len(part.sent) :]
        results |= {i: own[p] for i, p in enumerate(part.results) if p is not None}
    return [results[i] for i in sorted(results)]


def check(gm, parts):
    with torch.no_grad():
        expected = gm(*gm.meta["arguments"])
    for got, want in zip(chained(gm, parts), expected, strict=True):
        torch.testing.assert_close(got, want, atol=0, rtol=0)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "falcon"])
def test_two_stages(name):
    """Learned and rotary positions, scaled embeddings, windows, parallel parts."""
    gm = graph_of(name)
    mark_stages(gm, 2)
    parts = cut(gm, 2)
    check(gm, parts)
    assert [len(part.sent) for part in parts] == [1, 0]
    first, second = ({n.target for n in p.module.graph.nodes} for p in parts)
    assert torch.nn.functional.embedding in first
    if name != "gpt2":  # whose positions are an embedding in the graph's first part too
        assert torch.nn.functional.embedding not in second


def test_a_pass_that_drops_tokens_between_stages():
    """Positions of the tokens that are left travel with their hidden states."""
    gm = graph_of("llama", 64, logits_to_keep=1)
    mark_stages(gm, 2)
    config = "token-drop{method=lazy,schedule=[{layer=0,keep=0.5}],force=true}"
    (record,) = run_passes(gm, load_config(config).pipeline)
    assert record.changed
    gm.recompile()
    parts = cut(gm, 2)
    assert len(parts[0].sent) > 1
    check(gm, parts)


def test_too_many_stages():
    gm = graph_of("llama")
    with pytest.raises(ModelError, match="3 stages of a model in which 2 layers"):
        mark_stages(gm, 3)
    with pytest.raises(ModelError, match=r"2 layers with attention.*a model of 5"):
        mark_stages(gm, 2, expected=5)


def test_a_lost_mark():
    gm = graph_of("llama")
    with pytest.raises(ModelError, match="where stage 0 begins"):
        cut(gm, 2)


def test_layers_in_a_loop():
    gm = graph_of("llama", 64)
    mark_stages(gm, 2)
    (record,) = run_passes(gm, load_config("chunked-prefill{chunk=16}").pipeline)
    assert record.changed
    with pytest.raises(ModelError, match="chunked-prefill puts all layers into one"):
        cut(gm, 2)


def test_the_layers_of_stages():
    assert bounds(80, 4) == [0, 20, 40, 60]
    assert bounds(7, 3) == [0, 3, 5]


def test_state_that_stages_share_is_refused():
    graph = fx.Graph()
    x, kept = graph.placeholder("x"), graph.placeholder("kept")
    start = graph.call_function(torch.add, (x, 1))
    doubled = graph.call_function(torch.mul, (start, 2))
    write = graph.call_method("copy_", (kept, doubled))
    end = graph.call_function(torch.add, (doubled, 3))
    read = graph.call_method("clone", (kept,))
    total = graph.call_function(torch.add, (end, read))
    graph.output((total,))
    state = torch.zeros(4)
    for node in (x, start, doubled, end, read, total):
        node.meta["example_value"] = torch.zeros(4)
    for node in (kept, write):
        node.meta["example_value"] = state
    with pytest.raises(ModelError, match="1 reads in clone what copy_ of stage 0"):
        Members(graph, start, [end])
