"""The parts of the token-drop benchmark: questions, and figures on a small model."""

from __future__ import annotations

import pytest
import torch

from benchmarks import token_drop
from benchmarks.quality.documents import _PASSWORDS, Question, question
from benchmarks.quality.shares import OpTimes
from graphopt.models import load_tokenizer
from graphopt.search.runner import GraphRunner, configured
from tests.models import token_ids
from tests.passes.test_token_drop import model_of


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("smollm2")


@pytest.mark.parametrize("tokens", [512, 2048])
def test_a_question_ends_where_its_answer_begins(tokenizer, tokens):
    found = {question(tokenizer, tokens, seed).answer for seed in range(8)}
    assert len(found) > 3
    one = question(tokenizer, tokens, 0)
    text, answer = tokenizer.decode(one.ids[0]), tokenizer.decode([one.answer])
    assert one.ids.shape == (1, tokens)
    assert answer in _PASSWORDS
    begun = text[text.rindex("The password of") :]
    assert begun.endswith('"')
    assert text.count(begun + answer + '"') == 1
    assert text.count("\n\nDocument ") == max(2, round(tokens / 512))
    again = question(tokenizer, tokens, 0)
    assert torch.equal(again.ids, one.ids)


def test_every_password_is_one_token(tokenizer):
    counts = [len(tokenizer(w, add_special_tokens=False).input_ids) for w in _PASSWORDS]
    assert set(counts) == {1}


def test_too_short_for_documents(tokenizer):
    with pytest.raises(ValueError, match="too few for a document"):
        question(tokenizer, 100, 0)


@pytest.fixture(scope="module")
def runner():
    made = GraphRunner(model_of(layers=4), use_cache=False)
    for name, config in token_drop.configs().items():
        made.add(name, configured(config))
    return made


def test_rows_of_every_method(runner):
    questions = [Question(token_ids(1, 80), answer) for answer in (5, 9)]
    # The model's own best tokens are the answers: dense is right, others may be.
    dense = [runner.prefill("lossless", q.ids)[0] for q in questions]
    asked = [
        Question(q.ids, int(own.argmax()))
        for q, own in zip(questions, dense, strict=True)
    ]
    rows = {r["config"]: r for r in token_drop._fidelity(runner, 80, asked)}
    assert list(rows) == list(token_drop.configs())
    assert (rows["lossless"]["mean_kl"], rows["lossless"]["right"]) == (0.0, 1.0)
    for method in token_drop.METHODS:
        assert rows[method]["mean_kl"] > 0
        assert rows[method]["right"] == rows[method]["top1_agreement"]
    kl = {rows[method]["mean_kl"] for method in token_drop.METHODS}
    assert len(kl) == len(token_drop.METHODS)


def test_the_share_of_scoring(runner):
    row = token_drop._scoring(runner, "lazy", 80, token_ids(1, 80))
    assert 0 < row["scoring_share"] < 1
    times = OpTimes(configured(token_drop.configs()["lazy"]), token_drop.SCORING)
    runner.add("timed", times.edit)
    times.share(lambda: runner.prefill("timed", token_ids(1, 80)))
    # Three drops: a score, a choice, and stream, cosines and sines each.
    assert times.calls == 3 * 5
    dense = OpTimes(configured("structured-mask"), token_drop.SCORING)
    runner.add("none", dense.edit)
    with pytest.raises(ValueError, match=r"no graphopt\.token_scores"):
        runner.prefill("none", token_ids(1, 80))


def test_the_summary_names_methods():
    rows = [
        {"tokens": 8, "config": "lossless", "speedup": 1.0},
        {"tokens": 8, "config": "lazy", "speedup": 1.6},
        {"tokens": 8, "config": token_drop.OBSERVED, "speedup": 1.55},
        {"tokens": 8, "config": token_drop.LATE, "speedup": 1.5},
        {"tokens": 8, "config": token_drop.COMBINED, "speedup": 2.0},
        *(
            {
                "tokens": 4,
                "config": name,
                "mean_kl": kl,
                "top1_agreement": 1.0,
                "right": 0.5,
            }
            for name, kl in (("lazy", 0.1), ("random", 3.0))
        ),
        {"tokens": 8, "config": "lazy", "scoring_share": 0.01},
        {"tokens": 4, "config": "lazy", "scoring_share": 0.015},
        {"tokens": 4, "config": token_drop.OBSERVED, "scoring_share": 0.02},
    ]
    found = token_drop.summary(rows, 8)
    assert found["prefill_speedup_8"] == 1.6
    assert found["combined_speedup_8"] == 2.0
    assert found["late_speedup_8"] == 1.5
    assert found["kl"] == {4: {"lazy": 0.1, "random": 3.0}}
    assert found["right"][4]["random"] == 0.5
    assert (found["scoring_share"], found["observed_share"]) == (0.015, 0.02)
    assert found["observed_speedup_8"] == 1.55
