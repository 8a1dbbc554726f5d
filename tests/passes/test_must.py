"""`token-drop` on vision tokens against eager layers on each row's own tokens."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import pytest
import torch

from graphopt.backend import rewrite
from graphopt.options import parse_options
from tests.vision_configs import IMAGE, PATCHES, encoded, pixels, prompt, vision_model
from tests.vision_oracle import eager, key_set, run_rows

PLAN = [(0, Fraction(3, 5)), (2, Fraction(1, 5))]
POINTS = "schedule=[{layer=0,keep=0.6},{layer=2,keep=0.2}]"
ASKED = {"use_cache": False, "logits_to_keep": 1}


@pytest.fixture(autouse=True)
def one_graph(monkeypatch):
    """Placeholders and layers come into one graph."""
    monkeypatch.setenv("TRANSFORMERS_DISABLE_TORCH_CHECK", "1")


class Rewritten:
    """A model whose rewritten graphs run eagerly; ``remarks`` of its passes."""

    def __init__(self, model, config, dynamic=True):
        self.remarks: list[Any] = []
        self.graphs: list[Any] = []
        self.options = parse_options({"config": config})
        torch._dynamo.reset()
        self.compiled = torch.compile(model, backend=self._backend, dynamic=dynamic)

    def _backend(self, gm, examples):
        report, _ = rewrite(gm, self.options)
        self.remarks += [r for p in report.records for r in p.remarks]
        self.graphs.append(gm)
        return gm.forward

    def __call__(self, **inputs):
        with torch.no_grad():
            return self.compiled(**inputs, **ASKED).logits[:, 0]

    def codes(self):
        return {(r.kind, r.code) for r in self.remarks if r.pass_name == "token-drop"}


def warm(model, **inputs):
    """Let transformers install its hooks, which would break the graph."""
    with torch.no_grad():
        model(**inputs, **ASKED)


@pytest.mark.parametrize("method", ["must", "fastv", "random", "uniform"])
def test_equals_the_layers_on_the_kept_tokens(method):
    model = vision_model("llava")
    twin = eager(model)
    config = f"structured-mask,token-drop{{method={method},tokens=vision,{POINTS}}}"
    rows = prompt([60, 52], [[5], [3]], PATCHES)
    inputs = {**rows, "pixel_values": pixels(2)}
    warm(model, **inputs)
    fast = Rewritten(model, config)
    out = fast(**inputs)
    keys = key_set(twin, inputs["pixel_values"], 0.08).flatten()
    expected, _ = run_rows(
        twin, inputs, PLAN, method, keys=keys if method == "must" else None
    )
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    assert len(fast.graphs) == 1


def test_one_graph_for_every_length_and_several_images():
    model = vision_model("llava")
    twin = eager(model)
    fast = Rewritten(model, f"structured-mask,token-drop{{method=must,{POINTS}}}")
    for lengths, images in (
        ([120, 101], [[5, 60], [3, 50]]),
        ([90, 90], [[0, 36], [10, 50]]),
    ):
        inputs = {**prompt(lengths, images, PATCHES), "pixel_values": pixels(4)}
        warm(model, **inputs)
        keys = key_set(twin, inputs["pixel_values"], 0.08).flatten()
        expected, _ = run_rows(twin, inputs, PLAN, keys=keys)
        torch.testing.assert_close(fast(**inputs), expected, rtol=1e-4, atol=1e-5)
    assert len(fast.graphs) == 1


@pytest.mark.parametrize("name", ["llava_next", "qwen2_vl"])
def test_images_that_were_encoded_before(name):
    """What reaches the graph are features, of any number of tokens."""
    model, vision = vision_model(name), 30
    rows = prompt([50, 44], [[5], [3]], vision)
    if name == "qwen2_vl":
        rows["position_ids"] = spatial_positions(rows, vision)
    inputs = {**rows, **encoded(2, vision)}
    fast = Rewritten(model, f"structured-mask,token-drop{{method=must,{POINTS}}}")
    expected, _ = run_rows(eager(model), inputs, PLAN)
    torch.testing.assert_close(fast(**inputs), expected, rtol=1e-4, atol=1e-5)
    assert ("analysis", "no-key-set") in fast.codes()


def spatial_positions(rows, vision):
    """M-RoPE positions [3, B, S]: vision tokens lie on a grid of 5 columns."""
    ids = rows["input_ids"]
    places = torch.arange(ids.shape[1]).expand(3, *ids.shape).clone()
    for row, (real, line) in enumerate(zip(rows["attention_mask"], ids, strict=True)):
        first = int((line == IMAGE).nonzero()[0])
        grid = torch.arange(vision)
        at = torch.stack([torch.zeros_like(grid), grid // 5, grid % 5])
        places[:, row, first : first + vision] = first + at
        rest = ids.shape[1] - first - vision
        places[:, row, first + vision :] = first + 6 + torch.arange(rest)
        places[:, row] *= real
    return places


def test_nothing_goes_where_a_threshold_is_zero():
    inputs = {**prompt([60], [[5]], PATCHES), "pixel_values": pixels(1)}
    model = vision_model("llava")
    warm(model, **inputs)
    for config in (
        "token-drop{method=must,schedule=[{layer=1,keep=1.0}]}",
        "token-drop{tokens=vision,schedule=[{layer=1,keep=1.0}]}",
    ):
        fast = Rewritten(model, config)
        with torch.no_grad():
            dense = model(**inputs, **ASKED).logits[:, 0]
        assert torch.equal(fast(**inputs), dense)
        assert fast.codes() == {("missed", "keeps-all")}


def test_prompts_without_images_stay_as_they_are():
    model, rows = vision_model("llava"), prompt([20], [[]], 0)
    warm(model, **rows)
    fast = Rewritten(model, "token-drop{method=must}")
    with torch.no_grad():
        dense = model(**rows, **ASKED).logits[:, 0]
    assert torch.equal(fast(**rows), dense)
    assert fast.codes() == {("missed", "no-vision")}


def test_text_never_goes():
    """Rows with less vision tokens than are to go are an error, not a silent cut."""
    model = vision_model("llava")
    fast = Rewritten(model, "token-drop{method=must,schedule=[{layer=1,keep=0.2}]}")
    inputs = {**prompt([90, 90], [[5, 45], []], PATCHES), "pixel_values": pixels(2)}
    warm(model, **inputs)
    with pytest.raises(RuntimeError, match="fewer vision tokens"):
        fast(**inputs)


def test_all_tokens_of_a_prompt_with_images():
    """Methods that rank every token find the language model behind the encoder."""
    model = vision_model("llava")
    fast = Rewritten(model, "token-drop{schedule=[{layer=1,keep=0.5}]}")
    inputs = {**prompt([60, 52], [[5], [3]], PATCHES), "pixel_values": pixels(2)}
    warm(model, **inputs)
    fast(**inputs)
    assert fast.codes() == {("applied", "rewritten")}
