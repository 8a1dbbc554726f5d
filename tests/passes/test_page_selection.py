"""`page-selection` on graphs and in generation."""

from __future__ import annotations

import pytest
import torch
from transformers import DynamicCache

import graphopt
from graphopt.errors import ConfigError
from graphopt.graph_diff import reports_of
from tests.models import TINY, padding_mask, token_ids
from tests.rewriting import rewritten
from tests.runtime.test_cache import generated

SMALL = "page-selection{budget=128,interval=2}"


def prefilled(model, tokens=200, batch=2, **options):
    cache = graphopt.Cache(**options)
    with torch.no_grad():
        model(token_ids(batch, tokens), past_key_values=cache)
    return cache


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3", "mixtral"])
def test_graph_diff(graph_diff, name):
    model = TINY[name]()
    inputs = {
        "input_ids": token_ids(2, 1),
        "attention_mask": torch.cat(
            (padding_mask([200, 150], 200), torch.ones(2, 1)), 1
        ),
        "past_key_values": prefilled(model),
    }
    text = graph_diff(model, SMALL, f"page-selection-{name}", layer=1, **inputs)
    assert "graphopt.page_attention(" in text


def remarks(model, config, **inputs):
    reports = reports_of(model, config, inputs)
    return [r for report in reports for p in report.records for r in p.remarks]


def test_prefill_is_left_alone():
    found = remarks(
        TINY["llama"](),
        SMALL,
        input_ids=token_ids(1, 9),
        past_key_values=graphopt.Cache(),
    )
    assert [r.code for r in found] == ["not-decode"] * 2


def test_other_caches_are_left_alone():
    model, cache = TINY["llama"](), DynamicCache()
    with torch.no_grad():
        model(token_ids(1, 9), past_key_values=cache)
    found = remarks(model, SMALL, input_ids=token_ids(1, 1), past_key_values=cache)
    assert [r.code for r in found] == ["no-pages"] * 2


def test_windows_of_the_model_are_left_alone():
    model = TINY["gemma3"]()
    cache = prefilled(model, batch=1)
    found = remarks(model, SMALL, input_ids=token_ids(1, 1), past_key_values=cache)
    assert [r.code for r in found] == ["model-window", "rewritten"]


def test_applied_once():
    model = TINY["llama"]()
    cache = prefilled(model, batch=1)
    found = remarks(
        model, f"{SMALL},{SMALL}", input_ids=token_ids(1, 1), past_key_values=cache
    )
    assert [r.code for r in found] == ["rewritten"] * 2 + ["no-pages"] * 2


def test_the_cache_is_found_in_the_graph():
    model = TINY["llama"]()
    cache = prefilled(model, batch=1)
    inputs = {"input_ids": token_ids(1, 1), "past_key_values": cache}
    for config in ("", SMALL):
        (report,) = reports_of(model, config, inputs)
        assert [layer["cache"] for layer in report.structure] == ["paged"] * 2
    first = {"input_ids": token_ids(1, 9), "past_key_values": graphopt.Cache()}
    (report,) = reports_of(model, "", first)
    assert [layer["cache"] for layer in report.structure] == ["paged"] * 2


@pytest.mark.parametrize(
    "text", ["budget=64", "budget=1000", "interval=0", "interval=65"]
)
def test_options_are_whole_pages(text):
    with pytest.raises(ConfigError, match=text.split("=")[0]):
        graphopt.compile(TINY["llama"](), f"page-selection{{{text}}}")


def test_a_small_budget_changes_what_is_read():
    ids, mask = token_ids(2, 300), padding_mask([150, 300], 300)
    expected = generated(TINY["llama"](), DynamicCache(), ids, mask, steps=12)
    fast = rewritten(TINY["llama"](), SMALL)
    cache = graphopt.Cache()
    generated(fast, cache, ids, mask, steps=12)
    assert (cache.layers[0].selected >= 0).sum(-1).unique().tolist() == [2]
    wide = rewritten(TINY["llama"](), "page-selection{budget=4096}")
    assert torch.equal(generated(wide, graphopt.Cache(), ids, mask, steps=12), expected)


def test_streaming_heads_read_their_ring():
    """Rings that drop nothing change nothing; rings that drop do."""
    ids = token_ids(1, 300)
    expected = generated(TINY["llama"](), DynamicCache(), ids, steps=12)
    fast = rewritten(TINY["llama"](), "page-selection{budget=4096}")
    for local, same in ((320, True), (64, False)):
        cache = graphopt.Cache(streaming=[[0], [0, 1]], sink=64, local=local)
        tokens = generated(fast, cache, ids, steps=12)
        held = [layer.ring.keys.shape[1] for layer in cache.layers]
        assert held == [1 + local // 64 + 1 + 1] * 2
        assert torch.equal(tokens, expected) == same


def test_a_table_must_fit_the_model(tmp_path):
    (tmp_path / "gates.tsv").write_text("0.1\t0.9\n" * 3)
    model = TINY["llama"]()
    inputs = {
        "input_ids": token_ids(1, 1),
        "past_key_values": prefilled(model, batch=1),
    }
    text = f'page-selection{{table="{tmp_path}/gates.tsv"}}'
    (remark,) = remarks(model, text, **inputs)
    assert (remark.kind, remark.code) == ("failure", "table-size")
    assert "holds 3 layers, the model 2" in remark.message


def test_other_tables_name_no_kv_heads(tmp_path):
    (tmp_path / "heads.json").write_text('[{"0": ["stream_llm", 128, 896, 1.0]}]')
    text = f'page-selection{{table="{tmp_path}/heads.json"}}'
    with pytest.raises(ConfigError, match="rings are for KV heads"):
        graphopt.compile(TINY["llama"](), text)
