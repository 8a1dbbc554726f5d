"""The parts of the vision-drop benchmark, on a small random model."""

from __future__ import annotations

import pytest
import torch
from transformers import LlavaForConditionalGeneration

from benchmarks import vision_drop
from benchmarks.quality import llava
from benchmarks.quality.vision import Asked, bound_for, predicted
from benchmarks.quality.vision_sides import DENSE, LOSSLESS, SHARES, config, count
from benchmarks.quality.vision_summary import summary
from examples.tiny_vlm import model as tiny
from examples.tiny_vlm.data import canvases
from examples.tiny_vlm.evaluate import inputs
from graphopt.cli.example_inputs import encoder_in_graph

TOP = torch.finfo(torch.float32).max


def test_counts_are_those_of_the_shares():
    assert [count(144, share) for share in SHARES] == [72, 48, 32, 16]
    assert [count(576, share) for share in SHARES[1:]] == [192, 128, 64]


def test_tuned_thresholds_keep_the_count_on_average():
    """All of it at batch 1: one capture serves."""
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(tiny.config(layers=3)).eval()
    shown, share = canvases(4, split="validation"), SHARES[2]
    with encoder_in_graph():
        asked = Asked(model, shown)
        sizes = vision_drop.Sizes(batch=1, tried=((0.08, 10.0),))
        options = vision_drop.tuned(asked, share, shown, sizes)
        own = config("must", share, f"{vision_drop.BY_BOUNDS}{options}")
        kept = {
            DENSE: asked.answers(LOSSLESS, shown, 1).kept,
            "threshold": asked.answers(own, shown, 1).kept,
        }
        given = inputs(shown[:1])
        dense = predicted(asked.runner, LOSSLESS, given)
        part = predicted(asked.runner, config("must", share), given)
    assert kept == {DENSE: 144.0, "threshold": 32.0}
    # Two of three layers run on all tokens, one on 32 and the 13 of the text.
    tokens = given["input_ids"].shape[1]
    linear = (2 * tokens + tokens - 112) / (3 * tokens)
    assert linear - 0.05 < part.layers / dense.layers < linear
    assert dense.whole - part.whole == pytest.approx(dense.layers - part.layers)


def test_bounds_that_keep_a_number_on_average():
    endless = float("inf")
    ranks = torch.tensor(
        [[endless, TOP, 0.3, 0.9, 0.1], [endless, TOP / 2, 0.2, 0.8, TOP]]
    )
    assert bound_for(ranks, 2.0) == pytest.approx(0.8)
    assert bound_for(ranks, 2.5) == pytest.approx(0.3)
    with pytest.raises(ValueError, match="no bound leaves 1"):
        bound_for(ranks, 1)


def test_shapes_of_llava():
    model = llava.llava(layers=3, hidden=192, side=6)
    given = llava.prompt(model)
    assert given["input_ids"].shape == (1, 36 + llava.TEXT)
    with torch.no_grad():
        out = model(**given, logits_to_keep=1).logits
    assert out.shape[:2] == (1, 1)


def test_the_summary_names_the_counts_at_which_must_is_behind():
    def row(name, kept, accuracy, **more):
        own = {"model": "tiny", "config": name, "kept": kept, "accuracy": accuracy}
        return {"passes": "token-drop"} | own | more

    by_data = {"passes": "token-drop{mode=threshold}"}
    rows = [
        row("dense", 144.0, 0.94),
        row("must", 48.0, 0.8),
        row("must, tuned", 48.0, 0.9),
        row("pool", 48.0, 0.8),
        row("must", 16.0, 0.7),
        row("must, tuned", 16.0, 0.6),
        row("fastv", 16.0, 0.6),
        row("must, threshold", 17.3, 0.75, asked=16, **by_data),
        row("must, preset 64", 30.1, 0.85, **by_data),
        {"model": "tiny", "kept": 16, "gflop_share": 0.4, "layers_gflop_share": 0.3},
        {"model": "tiny", "config": "must", "kept": 16, "ratio": 0.9},
        {"model": "tiny", "config": "pool", "kept": 16, "ratio": 0.8},
    ]
    found = summary(rows, 400)
    assert found["accuracy"][144] == {"dense": 0.94}
    assert found["accuracy"][16]["fastv"] == 0.6
    assert found["best_method"] == {48: "must", 16: "must"}
    assert found["must_behind"] == [48]  # as often is not more often
    assert found["must_tuned_behind"] == [16]
    assert found["threshold"] == {16: {"kept": 17.3, "accuracy": 0.75}}
    assert found["preset"] == {"64": {"kept": 30.1, "accuracy": 0.85}}
    assert found["layers_gflop_share"] == {"tiny": {16: 0.3}}
    assert found["time_ratio"] == {"tiny": {16: 0.9}}
    assert found["accuracy_error"] == 0.02
