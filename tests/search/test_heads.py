"""The search over heads, on a tiny random model."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from importlib.metadata import version

import pytest
import torch
from torch.nn import functional as F

from graphopt.config import load_config
from graphopt.errors import ConfigError, PassError
from graphopt.models import LoadedModel
from graphopt.passes.attention.head_tables import read_table
from graphopt.search import heads as heads_module
from graphopt.search.calibrate import bisect, calibrate, parse_budget
from graphopt.search.candidates import candidates
from graphopt.search.job import HeadJob, find_heads
from graphopt.search.layer import LayerAttention
from graphopt.search.runner import GraphRunner, configured
from graphopt.search.texts import Text, read_text
from tests.models import TINY
from tests.search.letters import Letters, prose

TOKENS = 600
JOB = HeadJob(
    "graphopt search tiny", Text("prose.txt", prose(900)), TOKENS, 0, "a-shape:0:150"
)


def quiet(what, done, of):
    pass


@pytest.fixture(scope="module")
def loaded():
    return LoadedModel(TINY["llama"](), Letters(), "tiny")


def cost(self, options):
    """Stand for a clock, which other work on the machine would move."""
    numbers = [v for k, v in options.items() if k not in ("pattern", "sink", "stride")]
    return sum(numbers) / 1000


@pytest.fixture(scope="module")
def table(loaded, tmp_path_factory):
    path = tmp_path_factory.mktemp("search") / "heads.toml"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(LayerAttention, "seconds", cost)
        found = find_heads(loaded, JOB, path, quiet)
    assert len(found.heads) == 8
    return path


def layer(tokens=300):
    torch.manual_seed(1)
    shape = (1, 2, tokens, 16)
    query = torch.randn(1, 4, tokens, 16)
    return LayerAttention(query, torch.randn(shape), torch.randn(shape), scale=0.3)


def test_a_layer_computes_what_torch_computes():
    torch.manual_seed(1)
    q, k, v = torch.randn(1, 4, 90, 16), *torch.randn(2, 1, 2, 90, 16)
    own = LayerAttention(q, k, v, scale=0.3)
    expected = F.scaled_dot_product_attention(
        q, k, v, is_causal=True, scale=0.3, enable_gqa=True
    )
    torch.testing.assert_close(own.dense(), expected)
    covering = {"pattern": "a-shape", "sink": 0, "window": 90}
    assert own.errors(own.dense(), covering) == [0.0] * 4


def test_errors_are_relative_and_fall_with_the_size():
    own = layer()
    dense = own.dense()
    narrow, wide = (
        own.errors(dense, {"pattern": "a-shape", "sink": 2, "window": w})
        for w in (10, 250)
    )
    assert all(0 < b < a < 2 for a, b in zip(narrow, wide, strict=True))
    options = {"pattern": "a-shape", "sink": 2, "window": 10}
    wrong = own.sparse(options)[0, 3] - dense[0, 3]
    assert narrow[3] == pytest.approx(float(wrong.norm() / dense[0, 3].norm()), 1e-4)


@pytest.mark.parametrize("candidate", candidates(), ids=lambda c: c.name)
def test_every_candidate_is_one_that_the_pass_runs(candidate):
    own = layer()
    dense, size = own.dense(), 128 if candidate.highest is None else 900
    assert all(0 <= e < 2 for e in own.errors(dense, candidate.options(size)))


def test_bisection_finds_the_size_of_the_budget():
    size, cost = bisect(lambda s: s * 0.001, 4096, 1.0)
    assert cost == pytest.approx(1.0, rel=0.1)
    assert size == pytest.approx(1000, rel=0.1)
    assert bisect(lambda s: 5.0, 4096, 1.0)[1] == 5.0
    assert bisect(lambda s: 0.5, 64, 1.0)[0] <= 64


def test_a_budget_out_of_reach_is_a_reason_not_a_size():
    found = calibrate(layer(), candidates()[0], 1000.0, 300)
    assert "options" not in found
    assert "the nearest to 1000.000 s" in found["reason"]


@pytest.mark.parametrize("text", ["0", "1.5", "x", "a-shape:4", "a-shape:1:0", "nan"])
def test_bad_budgets(text):
    with pytest.raises(ConfigError, match=r"a share of dense .* a-shape:SINK:WINDOW"):
        parse_budget(text)


def test_the_table_is_one_that_the_pass_reads(loaded, table):
    rules = read_table(str(table), 0.5).rules
    covered = sorted((i, h) for r in rules for i in r.layers for h in r.heads)
    assert covered == [(i, h) for i in range(2) for h in range(4)]
    runner = GraphRunner(loaded.model)
    config = f'sparse-attention{{force=true,table="{table}"}}'
    runner.add("found", configured(config))
    logits, _ = runner.prefill("found", JOB.text.excerpt(Letters(), TOKENS, 0))
    assert logits.isfinite().all()
    assert load_config(config).pipeline
    text = table.read_text()
    assert "error by head: 0: 0." in text
    head = tomllib.loads(text)["search"]
    assert head["command"] == "graphopt search tiny --budget a-shape:0:150"
    assert head["seed"] == 0
    assert head["torch"] == version("torch")


def test_recorded_sizes_repeat_the_table_byte_for_byte(loaded, table, tmp_path):
    again = tmp_path / "again.toml"
    find_heads(loaded, replace(JOB, budget=None, sizes=str(table)), again, quiet)
    assert again.read_bytes() == table.read_bytes()
    assert [p.name for p in tmp_path.iterdir()] == ["again.toml"]


def test_a_search_that_is_cut_off_goes_on(loaded, table, tmp_path, monkeypatch):
    job = replace(JOB, budget=None, sizes=str(table))
    out, scored, original = tmp_path / "out.toml", [], LayerAttention.dense

    def breaks_down(self):
        scored.append(1)
        if len(scored) == 2:
            raise KeyboardInterrupt
        return original(self)

    monkeypatch.setattr(heads_module.LayerAttention, "dense", breaks_down)
    with pytest.raises(KeyboardInterrupt):
        find_heads(loaded, job, out, quiet)
    assert [p.name for p in tmp_path.iterdir()] == ["out.toml.partial"]
    with pytest.raises(ConfigError, match="was begun with seed = 0, now it is 1"):
        find_heads(loaded, replace(job, seed=1), out, quiet)
    find_heads(loaded, job, out, quiet)
    assert len(scored) == 3
    assert out.read_bytes() == table.read_bytes()


def test_refusals(loaded, table, tmp_path):
    out = tmp_path / "heads.toml"
    short = replace(JOB, text=Text("short.txt", prose(500)))
    with pytest.raises(ConfigError, match=r"short.txt: 500 tokens, .* asks for 600"):
        find_heads(loaded, short, out, quiet)
    with pytest.raises(ConfigError, match="made with --budget a-shape:0:150"):
        find_heads(loaded, replace(JOB, budget="0.5", sizes=str(table)), out, quiet)
    with pytest.raises(ConfigError, match=r"cannot be read"):
        find_heads(loaded, replace(JOB, sizes=str(tmp_path / "no.toml")), out, quiet)
    (tmp_path / "own.toml").write_text("[[heads]]\nwindow = 4\n")
    with pytest.raises(ConfigError, match=r"no \[search\] table"):
        find_heads(loaded, replace(JOB, sizes=str(tmp_path / "own.toml")), out, quiet)
    windowed = LoadedModel(TINY["gemma3"](), Letters(), "gemma3")
    with pytest.raises(PassError, match="is not plain causal"):
        find_heads(windowed, JOB, out, quiet)
    with pytest.raises(ConfigError, match=r"--text .*no.txt: cannot be read"):
        read_text(str(tmp_path / "no.txt"))


def test_the_seed_draws_the_excerpt():
    text = Text("prose.txt", prose(900))
    first, again = (text.excerpt(Letters(), 300, 0) for _ in range(2))
    other = text.excerpt(Letters(), 300, 1)
    assert torch.equal(first, again)
    assert not torch.equal(first, other)
    assert first.shape == (1, 300)
