"""`graphopt explain` on a vision-language model: a prompt with one image."""

from __future__ import annotations

import os

import torch

from graphopt.cli.example_inputs import example_inputs
from graphopt.cli.trace import trace
from tests.models import TINY
from tests.vision_configs import PATCHES, vision_model


def test_tokens_and_flops_by_layer():
    model = vision_model("llava")
    model.config.image_seq_length = PATCHES
    config = "token-drop{method=must,schedule=[{layer=0,keep=0.5},{layer=2,keep=0.25}]}"
    traced = trace(model, config, 50, use_cache=False)
    codes = [(r.site, r.code) for r in traced.reports[0].all_remarks()]
    assert ("graph", "key-set") in codes
    assert ("layer[2]", "rewritten") in codes
    rows = traced.layers[0]
    assert [row["layer"] for row in rows] == [0, 1, 2, 3, "ends"]
    assert [row["tokens_before"] for row in rows[:-1]] == [50] * 4
    assert [row["tokens_after"] for row in rows[:-1]] == [50, 32, 32, 23]
    for row in rows[1:-1]:
        # Products with weights by the tokens; attention, a part, by their square.
        part = row["gflop_after"] / row["gflop_before"]
        share = row["tokens_after"] / 50
        assert share**2 < part < share
    assert rows[-1]["gflop_after"] == rows[-1]["gflop_before"] > 0  # the encoder
    assert "TRANSFORMERS_DISABLE_TORCH_CHECK" not in os.environ


def test_prompts_that_are_too_short_have_no_image():
    model = TINY["llava"]()
    assert "pixel_values" not in example_inputs(model, 500)
    found = example_inputs(model, 576)
    assert found["pixel_values"].shape == (1, 3, 32, 32)
    model.config.image_grid_pinpoints = [[32, 64]]
    assert "pixel_values" not in example_inputs(model, 576)
    sized = torch.Size([1, 3, 32, 64])
    del model.config.image_grid_pinpoints
    model.config.vision_config.image_size = [32, 64]
    assert example_inputs(model, 576)["pixel_values"].shape == sized
