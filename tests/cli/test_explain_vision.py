"""`graphopt explain` on a vision-language model: a prompt with one image."""

from __future__ import annotations

import os

import torch

from graphopt.cli.example_inputs import example_inputs
from graphopt.cli.trace import trace
from tests.models import TINY


def test_tokens_and_flops_by_layer():
    model = TINY["llava"]()
    model.config.image_seq_length = 16
    config = "token-drop{method=must,schedule=[{layer=0,keep=0.25}]}"
    traced = trace(model, config, 24, use_cache=False)
    codes = [(r.site, r.code) for r in traced.reports[0].all_remarks()]
    assert ("graph", "key-set") in codes
    assert ("layer[0]", "rewritten") in codes
    first, second, ends = traced.layers[0]
    assert (first["tokens_before"], first["tokens_after"]) == (24, 24)
    assert (second["tokens_before"], second["tokens_after"]) == (24, 12)
    # Products with weights go by the tokens; attention, a part, by their square.
    assert first["gflop_after"] == first["gflop_before"] == second["gflop_before"]
    assert 1 / 4 < second["gflop_after"] / second["gflop_before"] < 1 / 2
    assert ends["gflop_after"] == ends["gflop_before"] > 0  # the encoder
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
