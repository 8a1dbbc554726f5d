"""A step as one compiled forward, against each request by itself."""

from __future__ import annotations

import pytest
import torch
import transformers as tf

from graphopt.backend import last_reports, rewrite
from graphopt.errors import ConfigError
from graphopt.options import parse_options
from graphopt.runtime.engine import Piece, compiled
from graphopt.runtime.engine.compiled import CompiledExecutor
from tests.models import TINY, token_ids


@pytest.fixture
def graphs(monkeypatch):
    """Rewritten graphs run as they are; returns those that were made."""
    made = []

    def lowered(gm, inputs, options):
        report, _ = rewrite(gm, parse_options(options))
        made.append(gm)
        return gm, report

    monkeypatch.setattr(compiled, "lowered", lowered)
    torch._dynamo.reset()
    return made


@torch.no_grad()
def logits_of(model, tokens):
    ids = torch.tensor([tokens])
    return model(ids, attention_mask=torch.ones_like(ids)).logits[0]


def steps(requests):
    """Chunks, decodes and both; rows that do not sample; pages in no order."""
    a, b, c = requests
    pages = ((9, 2, 6), (4, 0), (7,))
    spans = [
        [(0, a, 0, 70, False)],
        [(0, a, 70, 71, True), (1, b, 0, 30, False)],
        [(0, a, 71, 72, True), (1, b, 30, 64, True), (2, c, 0, 1, True)],
        [(2, c, 1, 40, True), (1, b, 64, 65, True)],
        [(2, c, 40, 41, True), (1, b, 65, 66, True)],
        [(1, b, 66, 67, False), (0, a, 72, 140, True)],
    ]
    for step in spans:
        yield [
            Piece(row, tuple(tokens[past:end]), past, pages[row], samples)
            for row, tokens, past, end, samples in step
        ]


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2", "mixtral"])
def test_rows_are_alone(graphs, name):
    model = TINY[name]()
    executor = CompiledExecutor(model, pages=10, rows=3, max_length=192)
    requests = [token_ids(1, 140, seed=i)[0].tolist() for i in range(3)]
    expected = [logits_of(model, tokens) for tokens in requests]
    for pieces in steps(requests):
        wanted = [
            expected[p.request][p.past + len(p.tokens) - 1] for p in pieces if p.samples
        ]
        actual = executor.run(pieces)
        assert actual.shape == (len(wanted), expected[0].shape[1])
        for got, want in zip(actual, wanted, strict=True):
            torch.testing.assert_close(got, want, atol=2e-4, rtol=1e-4)
    assert len(graphs) == 1, "one graph serves every step"


@pytest.mark.parametrize(("name", "reason"), [("gpt_oss", "sinks"), ("bloom", "")])
def test_a_model_that_rows_cannot_share(graphs, name, reason):
    with pytest.raises(ConfigError, match=f"cannot run batches of rows.*{reason}"):
        CompiledExecutor(TINY[name](), pages=4, rows=2)


def test_more_requests_than_rows(graphs):
    executor = CompiledExecutor(TINY["llama"](), pages=4, rows=2)
    pieces = [Piece(i, (5,), 0, (i,), True) for i in range(3)]
    with pytest.raises(ValueError, match="3 requests in a step of 2 rows"):
        executor.run(pieces)
    assert executor.cache.nbytes == 2 * 2 * 2 * 4 * 64 * 16 * 4


def test_by_inductor():
    torch._dynamo.reset()
    config = tf.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=3,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=100,
    )
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(config).eval()
    before = len(last_reports())
    executor = CompiledExecutor(model, pages=10, rows=3)
    requests = [token_ids(1, 140, seed=i)[0].tolist() for i in range(3)]
    expected = [logits_of(model, tokens) for tokens in requests]
    for pieces in steps(requests):
        actual = executor.run(pieces)
        wanted = [
            expected[p.request][p.past + len(p.tokens) - 1] for p in pieces if p.samples
        ]
        if wanted:
            torch.testing.assert_close(
                actual, torch.stack(wanted), atol=1e-4, rtol=1e-4
            )
    assert len(last_reports()) == before + 1
