"""The parts of the fidelity benchmark, on tiny random models."""

from __future__ import annotations

import pytest
import torch

from benchmarks import fidelity, harness
from benchmarks.quality.baselines import RandomColumns, columns_for, window_for
from benchmarks.quality.measure import Bench, Side, sides
from benchmarks.quality.passkey import DEPTHS, accuracy, needle, prompt_ids
from benchmarks.quality.summary import summary
from benchmarks.quality.table import Setting, read_settings
from graphopt.codegen.predicates import count_pairs
from graphopt.errors import ConfigError
from graphopt.search.density import causal_pairs, list_share
from graphopt.search.partial import Partial
from graphopt.search.runner import configured
from tests.models import TINY, token_ids

SETTING = Setting(pattern="a-shape", options={"sink": 4, "window": 40})


def write(folder, text):
    path = folder / "patterns.toml"
    path.write_text(text)
    return path


def test_the_table_has_a_default_and_three_budgets_a_pattern():
    rows = read_settings()
    for pattern in {row.pattern for row in rows}:
        own = [row for row in rows if row.pattern == pattern]
        assert [row.default for row in own].count(True) == 1
        assert len(own) >= 4
        assert all(not row.options for row in own if row.default)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('[[row]]\npattern = "a-shap"\n', "row 0, a-shap: .*not 'a-shap'"),
        ('[[row]]\npattern = "a-shape"\noptions = {wndow = 3}\n', "window"),
        ('[[row]]\npattern = "a-shape"\nbudget = 3\n', "row.0.budget"),
        ('[[row]]\npattern = "a-shape"\n' * 2, "two rows are 'a-shape'"),
        ("[[row]\n", "cannot be read"),
    ],
)
def test_a_row_that_the_pass_refuses_is_an_error(tmp_path, text, message):
    with pytest.raises(ConfigError, match=message):
        read_settings(write(tmp_path, text))


@pytest.mark.parametrize("tokens", [300, 1024])
@pytest.mark.parametrize("density", [0.25, 0.6])
def test_baselines_visit_the_density_that_is_asked_for(tokens, density):
    window = window_for(density, tokens)
    pairs = count_pairs("sliding-window", tokens, tokens, window=window)
    assert pairs / causal_pairs(tokens) == pytest.approx(density, abs=0.01)
    q = torch.randn(1, 8, tokens, 4)
    lists = RandomColumns(density, seed=3)(q, q)
    share = list_share(lists, (0,), tokens)
    assert columns_for(density, tokens) > 0
    assert share == pytest.approx(density, abs=0.05)
    heads = lists.columns[0]
    assert not torch.equal(heads[0], heads[1])


def test_a_row_and_its_baselines():
    bench = Bench(TINY["llama"](), None, token_ids(1, 301), last=32)
    side = Side(SETTING.label, configured(SETTING.config()))
    own = bench.fidelity(side, 300)
    expected = count_pairs("a-shape", 300, 300, sink=4, window=40) / causal_pairs(300)
    assert own["density"] == pytest.approx(expected, abs=1e-4)
    assert own["mean_kl"] > 0
    assert own["perplexity"] != own["dense_perplexity"]
    for other in sides(SETTING, own["density"], 300):
        found = bench.fidelity(other, 300)
        assert found["density"] == pytest.approx(expected, abs=0.05)
        assert found["mean_kl"] > 0
    dense = bench.fidelity(Side("a", configured("")), 300)
    assert dense["density"] == 1.0
    assert (dense["mean_kl"], dense["top1_agreement"]) == (0.0, 1.0)


class Letters:
    """A tokenizer of single characters with a chat template."""

    def apply_chat_template(self, messages, **options):
        return f"<{messages[0]['content']}>"

    def __call__(self, text, **options):
        return type("Encoded", (), {"input_ids": [ord(c) for c in text]})

    def decode(self, ids):
        return "".join(map(chr, ids))


class Wide(Letters):
    """The same for a model of a hundred tokens."""

    def __call__(self, text, **options):
        ids = [3 + ord(c) % 96 for c in text]
        return type("Encoded", (), {"input_ids": ids})


class Echo:
    """A model that writes the answer it is told, a character a step."""

    def __init__(self):
        self.rest = ""

    def step(self):
        head, self.rest = self.rest[:1] or " ", self.rest[1:]
        return torch.nn.functional.one_hot(torch.tensor([[ord(head)]]), 256).float()

    def __call__(self, ids, **options):
        return type("Output", (), {"logits": self.step()})


@pytest.mark.parametrize("kind", ["passkey", "magic-number"])
def test_prompts_hold_the_needle_at_its_depth(kind):
    text, item = [ord("x")] * 900, needle(kind, 5)
    written = []
    for depth in DEPTHS:
        ids = prompt_ids(Letters(), text, item, 700, depth)[0].tolist()
        assert len(ids) == 700
        prompt = Letters().decode(ids)
        assert prompt.endswith(item.begun)
        assert item.before in prompt
        written.append(prompt.index(item.sentence))
    assert written == sorted(set(written))
    assert needle(kind, 5) == item
    assert needle(kind, 6).answer != item.answer
    with pytest.raises(ValueError, match="left for a text"):
        prompt_ids(Letters(), text, item, 100, 0.5)


@pytest.mark.parametrize("kind", ["passkey", "magic-number"])
def test_only_answers_with_the_number_count(kind):
    echo = Echo()

    def prefill(known):
        def run(ids):
            prompt, items = Letters().decode(ids[0].tolist()), range(10)
            item = next(n for i in items if (n := needle(kind, i)).sentence in prompt)
            echo.rest = item.answer if known else "nothing that is a number"
            return echo.step()[0], None

        return run

    for known, share in ((True, 1.0), (False, 0.0)):
        rest = (prefill(known), [ord("x")] * 900, kind, 600)
        assert accuracy(echo, Letters(), *rest) == share


def test_groups_are_measured_once(tmp_path):
    calls = []

    def measure():
        calls.append(1)
        return [{"config": "a", "tokens": 8}]

    for _ in range(2):
        rows = fidelity._Rows(Partial(tmp_path / "it", {"seed": 0}))
        rows.add("a@8", measure)
        assert rows.all == [{"config": "a", "tokens": 8}]
    assert len(calls) == 1


def test_the_summary_names_rows_that_a_baseline_beats():
    def row(config, kl, baseline=False, default=True, density=0.3):
        return {
            "config": config, "tokens": 8192, "mean_kl": kl, "baseline": baseline,
            "default": default, "speedup": 2.0, "density": density,
        }  # fmt: skip

    rows = [
        row("a", 0.04),
        row("a / window", 0.5, baseline=True),
        row("b", 0.4),
        row("b / window", 0.3, baseline=True),
        row("b{x=1}", 0.2, default=False),
        row("c", 0.0, default=False, density=1.0),
        row("c / window", 0.0, baseline=True, default=False, density=1.0),
        {"config": "a", "tokens": 8192, "passkey": 1.0, "baseline": False},
    ]
    found = summary(rows, (4096, 8192), 256)
    assert found["kl_8192"] == {
        "a": 0.04, "a / window": 0.5, "b": 0.4, "b / window": 0.3
    }  # fmt: skip
    assert found["behind_a_baseline"] == ["b / window at 8192"]
    assert found["best_speedup_8192_within_kl_0.05"]["config"] == "a"


@pytest.fixture
def small(tmp_path, monkeypatch):
    """Let the whole benchmark run on a tiny model, short prompts and few rows."""
    bench = Bench(TINY["llama"](), Wide(), token_ids(1, 601), last=64)
    rows = [
        Setting(
            pattern="a-shape", options={"window": 50}, default=True, baselines=True
        ),
        Setting(pattern="antidiagonal", options={"threshold": 0.3}),
        Setting(
            pattern="block-sparse", options={"blocks": 3}, retrieval="with-baselines"
        ),
    ]
    monkeypatch.setattr(fidelity, "_smollm2", lambda tokens: bench)
    monkeypatch.setattr(fidelity, "read_settings", lambda: rows)
    monkeypatch.setattr(fidelity, "LENGTHS", (300, 600))
    monkeypatch.setattr(fidelity, "RETRIEVAL", (500,))
    monkeypatch.setattr(fidelity, "_partial_path", lambda: tmp_path / "it.partial")
    monkeypatch.setattr(harness, "RESULTS", tmp_path)
    return tmp_path


def test_the_whole_benchmark_and_its_resumption(small, monkeypatch):
    def breaks_down(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(fidelity, "_retrieval", breaks_down)
        with pytest.raises(KeyboardInterrupt):
            fidelity.main()
    assert (small / "it.partial").exists()
    with monkeypatch.context() as patch:
        patch.setattr(fidelity.Bench, "fidelity", breaks_down)  # all done already
        result = fidelity.main()
    kinds = {(row["config"], row["tokens"]) for row in result["rows"]}
    assert ("a-shape{window=50} / random columns", 600) in kinds
    assert ("antidiagonal{threshold=0.3}", 300) in kinds
    found = [row for row in result["rows"] if "passkey" in row]
    assert [row["config"] for row in found] == [
        "dense",
        "block-sparse{blocks=3}",
        "block-sparse{blocks=3} / random columns",
        "block-sparse{blocks=3} / window",
    ]
    assert len(result["summary"]["kl_600"]) == 3
    written = sorted(path.name.split("-cpu")[0] for path in small.iterdir())
    assert written == ["fidelity", "fidelity", "fidelity-density"]
