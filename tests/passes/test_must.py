"""`token-drop` on vision tokens against eager layers on each row's own tokens."""

from __future__ import annotations

import functools
from fractions import Fraction
from typing import Any

import pytest
import torch
from torch import fx

from graphopt.backend import rewrite
from graphopt.ir.match import op_name
from graphopt.options import parse_options
from tests.models import TINY, capture, copy_graph
from tests.vision_configs import IMAGE, PATCHES, encoded, pixels, prompt, vision_model
from tests.vision_oracle import Rule, chosen_windows, eager, key_set, run_rows

PLAN = [(0, Fraction(3, 5)), (1, Fraction(1, 5))]
POINTS = "schedule=[{layer=0,keep=0.6},{layer=1,keep=0.2}]"
VOCABULARY = 100
ASKED = {"use_cache": False, "logits_to_keep": 1}


@pytest.fixture(autouse=True)
def one_graph(monkeypatch):
    """Placeholders and layers come into one graph."""
    monkeypatch.setenv("TRANSFORMERS_DISABLE_TORCH_CHECK", "1")


@functools.cache
def model_of(name="llava"):
    model = vision_model(name)
    return model, eager(model)


def warm(model, inputs):
    """Let transformers install its hooks, which would break the graph."""
    with torch.no_grad():
        return model(**inputs, **ASKED).logits[:, 0]


@functools.cache
def llava():
    """The inputs of a padded batch, the dense logits and the graph."""
    inputs = {**prompt([60, 52], [[5], [3]], PATCHES), "pixel_values": pixels(2)}
    dense = warm(model_of()[0], inputs)
    (graph,) = capture(model_of()[0], **inputs, **ASKED)
    captured = logits_of(graph, graph.meta["arguments"])
    close(captured, dense)
    return inputs, captured, graph


def rewritten(graph, config):
    """Run the passes on a copy; return its last logits, their remarks and `Places`."""
    gm = copy_graph(graph)
    report, _ = rewrite(gm, parse_options({"config": config}))
    remarks = [r for p in report.records for r in p.remarks]
    remarks = [r for r in remarks if r.pass_name == "token-drop"]
    places = Places(gm)
    logits = logits_of(places.run, graph.meta["arguments"])
    return logits, {(r.kind, r.code) for r in remarks}, places.alive


def logits_of(run, arguments):
    with torch.no_grad():
        outputs = run(*arguments)
    return next(o for o in outputs if o.shape[-1] == VOCABULARY)[:, 0]


class Places(fx.Interpreter):
    """Runs a graph; ``alive`` [B, S'] are the prompt's places that its drops leave."""

    alive = None

    def run_node(self, n):
        value = super().run_node(n)
        if op_name(n) in ("graphopt.keep_tokens", "graphopt.keep_passing"):
            whole = self.alive is None
            self.alive = value if whole else self.alive.gather(1, value)
        return value


def same_places(found, expected, inputs):
    """Padding that fills a row up is no token of the prompt."""
    for row, places in enumerate(found):
        real = inputs["attention_mask"][row, places].bool()
        assert places[real].tolist() == expected[row]


def must(options="", points=POINTS):
    return f"structured-mask,token-drop{{method=must,{options}{points}}}"


def close(actual, expected):
    # Rotary angles are float32, also in a float64 model.
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-5)


def test_must_keeps_what_the_eager_filter_keeps():
    inputs, _, graph = llava()
    keys = key_set(model_of()[1], inputs["pixel_values"], 0.08).flatten()
    expected, alive = run_rows(model_of()[1], inputs, Rule(PLAN, keys=keys))
    out, codes, places = rewritten(graph, must())
    close(out, expected)
    same_places(places, alive, inputs)
    assert codes == {("applied", "rewritten"), ("analysis", "key-set")}
    without, _ = run_rows(model_of()[1], inputs, Rule(PLAN))
    assert not torch.allclose(without, expected)  # the key set matters here
    close(rewritten(graph, must("key_share=0.0,"))[0], without)


@pytest.mark.parametrize("method", ["lazy", "fastv", "random", "uniform", "pool"])
def test_baselines_on_vision_tokens(method):
    inputs, _, graph = llava()
    expected, _ = run_rows(model_of()[1], inputs, Rule(PLAN, method))
    config = f"structured-mask,token-drop{{method={method},tokens=vision,{POINTS}}}"
    close(rewritten(graph, config)[0], expected)


def test_merged_windows():
    inputs, dense, graph = llava()
    twin, images = model_of()[1], inputs["pixel_values"]
    plan = [(0, Fraction(1, 2)), (1, Fraction(1, 5))]
    windows = chosen_windows(twin, images, 2)
    assert [len(image) for image in windows] == [2, 2]
    keys = key_set(twin, images, 0.08, windows).flatten()
    expected, _ = run_rows(twin, inputs, Rule(plan, keys=keys, windows=windows))
    points = "schedule=[{layer=0,keep=0.5},{layer=1,keep=0.2}]"
    out, codes, _ = rewritten(graph, must("merge_share=0.5,", points))
    close(out, expected)
    assert ("analysis", "merged") in codes
    out, codes, _ = rewritten(graph, must("merge_share=0.5,"))
    assert codes == {("missed", "cannot-follow")}  # 20 of 36 are left, 22 are to live
    close(out, dense)  # nor do windows merge


@pytest.mark.parametrize("bounds", [(0.03, 0.1), (0.04, 0.3)])
def test_thresholds(bounds):
    """The number of tokens depends on data: the row that keeps most sets it."""
    inputs, _, graph = llava()
    twin, images = model_of()[1], inputs["pixel_values"]
    windows = chosen_windows(twin, images, PATCHES, 0.02)
    assert [len(image) for image in windows] == [1, 1]
    keys = key_set(twin, images, 0.08, windows, of_all=True).flatten()
    rule = Rule(PLAN, thresholds=bounds, keys=keys, windows=windows, by_threshold=True)
    expected, alive = run_rows(twin, inputs, rule)
    assert len(alive[0]) < 60 - 8  # more than the merged went
    both = "global_threshold={},individual_threshold={},".format(*bounds)
    config = must(f"mode=threshold,similarity=0.02,{both}")
    out, _, places = rewritten(graph, config)
    close(out, expected)
    same_places(places, alive, inputs)


def test_thresholds_of_zero_let_nothing_go():
    _, dense, graph = llava()
    options = "mode=threshold,individual_threshold=0.0,similarity=1.0,"
    out, codes, _ = rewritten(graph, f"token-drop{{method=must,{options}{POINTS}}}")
    assert ("applied", "rewritten") in codes
    assert torch.equal(out, dense)


@pytest.mark.parametrize("options", ["method=must", "tokens=vision"])
def test_a_share_of_one_leaves_the_graph(options):
    _, dense, graph = llava()
    config = f"token-drop{{{options},schedule=[{{layer=1,keep=1.0}}]}}"
    out, codes, _ = rewritten(graph, config)
    assert torch.equal(out, dense)
    assert codes == {("missed", "keeps-all")}


def test_methods_on_all_tokens_find_the_language_model():
    _, dense, graph = llava()
    out, codes, _ = rewritten(graph, "token-drop{schedule=[{layer=1,keep=0.5}]}")
    assert codes == {("applied", "rewritten")}
    assert not torch.allclose(out, dense)


class Compiled:
    """A model whose rewritten graphs run on a simple host."""

    def __init__(self, model, config, host="eager"):
        self.graphs: list[Any] = []
        self.options = parse_options({"config": config})
        self.host = torch._dynamo.lookup_backend(host)
        torch._dynamo.reset()
        self.compiled = torch.compile(model, backend=self._backend, dynamic=True)

    def _backend(self, gm, examples):
        self.graphs.append(rewrite(gm, self.options)[0])
        return self.host(gm, examples)

    def __call__(self, **inputs):
        with torch.no_grad():
            return self.compiled(**inputs, **ASKED).logits[:, 0]


BOUNDS = (0.03, 0.1)
BY_BOUNDS = (
    "mode=threshold,similarity=1.0,global_threshold=0.03,individual_threshold=0.1,"
)


@pytest.mark.parametrize("by_threshold", [False, True])
def test_one_graph_for_every_length_and_several_images(by_threshold):
    """By thresholds each call has a number of tokens of its own."""
    model, twin = model_of()
    host = "aot_eager" if by_threshold else "eager"
    fast = Compiled(model, must(BY_BOUNDS if by_threshold else ""), host)
    for seed, lengths, images in (
        (0, [120, 101], [[5, 60], [3, 50]]),
        (1, [90, 90], [[0, 36], [10, 50]]),
    ):
        rows = prompt(lengths, images, PATCHES, seed)
        inputs = {**rows, "pixel_values": pixels(4, seed)}
        warm(model, inputs)
        keys = key_set(twin, inputs["pixel_values"], 0.08).flatten()
        rule = Rule(PLAN, keys=keys)
        if by_threshold:
            rule = Rule(PLAN, thresholds=BOUNDS, keys=keys, by_threshold=True)
        expected, _ = run_rows(twin, inputs, rule)
        close(fast(**inputs), expected)
    assert len(fast.graphs) == 1


def test_thresholds_on_one_row():
    model, twin = model_of()
    inputs = {**prompt([60], [[5]], PATCHES), "pixel_values": pixels(1)}
    warm(model, inputs)
    keys = key_set(twin, inputs["pixel_values"], 0.08).flatten()
    rule = Rule(PLAN, thresholds=BOUNDS, keys=keys, by_threshold=True)
    expected, alive = run_rows(twin, inputs, rule)
    assert len(alive[0]) < 60
    close(Compiled(model, must(BY_BOUNDS), "aot_eager")(**inputs), expected)


def test_text_never_goes():
    """Rows with less vision tokens than are to go are an error, not a silent cut."""
    model, twin = model_of()
    inputs = {**prompt([90, 60], [[5, 45], []], PATCHES), "pixel_values": pixels(2)}
    warm(model, inputs)
    (graph,) = capture(model, **inputs, **ASKED)
    with pytest.raises(RuntimeError, match="fewer vision tokens"):
        rewritten(graph, must(points="schedule=[{layer=1,keep=0.05}]"))
    keys = key_set(twin, inputs["pixel_values"], 0.08).flatten()
    rule = Rule(PLAN, thresholds=BOUNDS, keys=keys, by_threshold=True)
    expected, alive = run_rows(twin, inputs, rule)
    assert [len(row) for row in alive] == [60, 60]  # the row without an image sets it
    close(rewritten(graph, must(BY_BOUNDS))[0], expected)


@pytest.mark.parametrize("name", ["llava_next", "qwen2_vl"])
def test_images_that_were_encoded_before(name):
    """What reaches the graph are features, of any number of tokens."""
    (model, twin), vision = model_of(name), 30
    rows = prompt([50, 44], [[5], [3]], vision)
    if name == "qwen2_vl":
        rows["position_ids"] = spatial_positions(rows, vision)
    inputs = {**rows, **encoded(2, vision)}
    (graph,) = capture(model, **inputs, **ASKED)
    expected, _ = run_rows(twin, inputs, Rule(PLAN))
    out, codes, _ = rewritten(graph, must())
    close(out, expected)
    assert ("analysis", "no-encoder-stage") in codes


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


def test_graph_diff(graph_diff):
    """The language model's first layer: scores, ranks, and what is taken behind it."""
    model, inputs = TINY["llava"](), prompt([24, 20], [[3], [2]], 16)
    inputs["pixel_values"] = torch.rand(2, 3, 32, 32)
    warm(model, inputs)
    config = must(points="schedule=[{layer=0,keep=0.25}]")
    text = graph_diff(model, config, "token-drop-must", layer=0, **inputs, **ASKED)
    assert "graphopt.dual_scores(" in text


def test_prompts_without_images_stay_as_they_are():
    model, rows = model_of()[0], prompt([20], [[]], 0)
    warm(model, rows)
    (graph,) = capture(model, **rows, **ASKED)
    dense = logits_of(graph, graph.meta["arguments"])
    out, codes, _ = rewritten(graph, "token-drop{method=must}")
    assert torch.equal(out, dense)
    assert codes == {("missed", "no-vision")}
