"""`chunked-prefill`: a prompt in chunks gives what it gives whole."""

from __future__ import annotations

import pytest
import torch

import graphopt
from graphopt.backend import rewrite
from graphopt.config import load_config
from graphopt.errors import ConfigError
from graphopt.ir.loops import innermost
from graphopt.options import parse_options
from tests.models import TINY, capture, padding_mask, token_ids
from tests.rewriting import rewritten

CHUNK = 8
CONFIG = f"chunked-prefill{{chunk={CHUNK}}}"
# One token is decoding; 1, 2, 3 and 4 chunks, full, short of one token, over by one.
LENGTHS = [2, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK, 2 * CHUNK + 1, 3 * CHUNK, 31]


def both(name, config, tokens=27, **inputs):
    """Outputs of the captured graph, whole and rewritten, and the pass's remark."""
    inputs = {"input_ids": token_ids(2, tokens), **inputs}
    gm = capture(TINY[name](), **inputs)[0]
    arguments = gm.meta["arguments"]
    whole = gm(*arguments)
    report, _ = rewrite(gm, parse_options({"config": config}))
    return whole, gm(*arguments), report.records[0].remarks[0]


def assert_same(got, want, mask=None):
    for a, b in zip(got, want, strict=True):
        if isinstance(a, torch.Tensor) and mask is not None and a.dim() > 2:
            a, b = (x.transpose(1, 2) if x.dim() == 4 else x for x in (a, b))
            shown = mask[:, -a.shape[1] :].bool()
            a, b = a[shown], b[shown]
        torch.testing.assert_close(a, b, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("name", ["llama", "mistral", "gemma2", "gpt2"])
@torch.no_grad()
def test_equals_the_whole_prompt(name):
    whole, chunked, remark = both(name, CONFIG)
    assert remark.kind == "applied"
    assert_same(chunked, whole)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_padded_batches(side):
    mask = padding_mask([27, 12], 27, side)
    whole, chunked, remark = both("gemma3", CONFIG, attention_mask=mask)
    assert remark.kind == "applied"
    assert_same(chunked, whole, mask)


@torch.no_grad()
def test_every_length_through_one_graph():
    model, graphs = TINY["llama"](), []

    def backend(gm, inputs):
        rewrite(gm, parse_options({"config": CONFIG}))
        graphs.append(gm)
        return gm

    torch._dynamo.reset()
    chunked = torch.compile(TINY["llama"](), backend=backend, dynamic=True)
    for length in LENGTHS:
        ids = token_ids(1, length, seed=length)
        want, got = model(ids), chunked(ids)
        torch.testing.assert_close(got.logits, want.logits, atol=2e-5, rtol=1e-4)
    assert len(graphs) == 1
    sizes = {
        size
        for node in innermost(graphs[0]).graph.nodes
        if node.op == "call_function" and node.meta.get("example_value") is not None
        for size in getattr(node.meta["example_value"], "shape", ())
    }
    assert all(isinstance(size, int) for size in sizes)


@torch.no_grad()
def test_a_graph_of_fixed_sizes():
    model, ids = TINY["llama"](), token_ids(1, 27)
    gm = capture(model, dynamic=False, input_ids=ids)[0]
    want = gm(*gm.meta["arguments"])
    report, _ = rewrite(gm, parse_options({"config": CONFIG}))
    assert report.records[0].changed
    assert_same(gm(*gm.meta["arguments"]), want)


@torch.no_grad()
def test_generates_the_same_tokens_from_pages():
    model, ids = TINY["llama"](), token_ids(1, 27)
    options = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": 0}
    want = model.generate(ids, **options)
    got = rewritten(model, CONFIG).generate(
        ids, **options, past_key_values=graphopt.Cache(max_tokens=64)
    )
    assert torch.equal(got, want)


@torch.no_grad()
def test_one_compilation_of_the_body():
    model = TINY["llama"]()
    compiled = torch.compile(
        TINY["llama"](), backend="graphopt", options={"config": CONFIG}, dynamic=True
    )
    before = len(graphopt.last_reports())
    for length in (27, 8, 5, 16):
        ids = token_ids(1, length, seed=length)
        want, got = model(ids, logits_to_keep=1), compiled(ids, logits_to_keep=1)
        torch.testing.assert_close(got.logits, want.logits, atol=2e-5, rtol=1e-4)
    assert len(graphopt.last_reports()) == before + 1


@torch.no_grad()
def test_sparse_attention_in_the_body():
    sparse = "sparse-attention{sink=4,window=6,force=true}"
    whole = both("llama", sparse)[1]
    assert_same(both("llama", f"{CONFIG},{sparse}")[1], whole)


@torch.no_grad()
def test_selection_sees_all_keys_of_a_chunk():
    """With all columns and slashes selected, what is selected is everything."""
    everything = (
        "sparse-attention{pattern=vertical-slash,sink=2,window=4,vertical=40,slash=40,"
        "force=true}"
    )
    whole, sparse, _ = both("llama", f"{CONFIG},{everything}")
    assert_same(sparse, whole)


@pytest.mark.parametrize(
    ("name", "inputs", "code", "reason"),
    [
        ("bert", {}, "bidirectional", "not causal"),
        ("gpt_oss", {}, "attention", "sinks"),
        ("mixtral", {}, "cannot-follow", "may look from one token at others"),
        ("llama", {"tokens": 6, "dynamic": False}, "short", "6 tokens are one chunk"),
    ],
)
@torch.no_grad()
def test_refusals(name, inputs, code, reason):
    dynamic = inputs.get("dynamic", True)
    ids = token_ids(2, inputs.get("tokens", 27))
    gm = capture(TINY[name](), dynamic=dynamic, input_ids=ids)[0]
    report, _ = rewrite(gm, parse_options({"config": CONFIG}))
    remark = report.records[0].remarks[0]
    assert (remark.kind, remark.code) == ("missed", code)
    assert reason in remark.message


def test_a_chunk_has_tokens():
    with pytest.raises(ConfigError, match="at least 2 tokens"):
        load_config("chunked-prefill{chunk=1}")
