"""The sweep over architectures: a child that dies or hangs is a row like any other."""

from __future__ import annotations

import os
import time

import pytest

from benchmarks import architectures
from tests.tiny_configs import tiny_config, tiny_model


def row_of(monkeypatch, build, name="llama"):
    monkeypatch.setattr(architectures, "tiny_model", build)
    return architectures._isolated(name, "LlamaForCausalLM")


def test_a_child_that_dies(monkeypatch):
    row = row_of(monkeypatch, lambda *a: os._exit(3))
    assert row["failure"] == "the process died with 3"
    assert not row["built"]


def test_a_child_that_hangs(monkeypatch):
    monkeypatch.setattr(architectures, "SECONDS", 1)
    assert row_of(monkeypatch, lambda *a: time.sleep(60))["failure"] == "over 1 s"


def test_a_model_that_cannot_be_built(monkeypatch):
    def build(*a):
        raise ImportError("needs timm\nand more")

    assert row_of(monkeypatch, build)["failure"] == "ImportError: needs timm (build)"


def test_a_row_and_the_summary(monkeypatch):
    row = row_of(monkeypatch, tiny_model)
    assert (row["sites"], row["patterns"]) == (4, ["causal"] * 4)
    assert (row["lossless"], row["dense"], row["sparse"]) == (2, 2, 4)
    assert row["difference"] < architectures.TOLERANCE
    changed = {**row, "difference": 1.0, "unsupported": ["bias", "bias"]}
    without = {**row, "sites": 0}
    unbuilt = {"name": "x", "built": False, "failure": "no"}
    summary = architectures.summary([row, changed, without, unbuilt])
    assert summary == {
        "architectures": 4,
        "built": 3,
        "captured": 3,
        "all_raised": 1,
        "no_attention": 1,
        "lossless_changed": 1,
        "failed": 1,
        "reasons": {"bias": 1},
    }


@pytest.mark.parametrize(("model_type", "layers"), [("llama", 2), ("cohere2", 2)])
def test_tiny_configs_keep_each_kind_of_layer(model_type, layers):
    config = tiny_config(model_type)
    assert config.num_hidden_layers == layers
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    assert len(kinds) == (2 if model_type == "cohere2" else 1)
