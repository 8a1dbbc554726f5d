"""`token-drop` on vision tokens with `graphopt.Cache`: what decoding attends to."""

from __future__ import annotations

import copy
from fractions import Fraction

import pytest
import torch

import graphopt
from graphopt.backend import rewrite
from graphopt.options import parse_options
from tests.models import copy_graph
from tests.vision_configs import PATCHES, pixels, prompt, vision_model
from tests.vision_decoding import greedy
from tests.vision_oracle import Rule, eager

STEPS = 4
PLAN = [(0, Fraction(3, 5)), (1, Fraction(1, 5))]
POINTS = "schedule=[{layer=0,keep=0.6},{layer=1,keep=0.2}]"
BOUNDS = (0.03, 0.1)
THRESHOLD = (
    "must,mode=threshold,similarity=1.0,global_threshold=0.03,individual_threshold=0.1"
)


def config(method):
    return f"structured-mask,token-drop{{method={method},tokens=vision,{POINTS}}}"


class Generating:
    """A model whose graphs, captured once, run as any config rewrites them."""

    def __init__(self, model):
        self.model = copy.deepcopy(model)
        self.model.compile(backend=self._backend, dynamic=True)
        self.config, self.remarks = "", []

    def _backend(self, gm, _):
        versions = {}

        def run(*arguments):
            if self.config not in versions:
                own = copy_graph(gm)
                options = parse_options({"config": self.config, "strict": True})
                self.remarks += rewrite(own, options)[0].all_remarks()
                versions[self.config] = own
            return versions[self.config](*arguments)

        return run

    def __call__(self, text, inputs):
        """Return the logits [B, STEPS, V] of greedy decoding, and the cache."""
        self.config, self.remarks = text, []
        cache = graphopt.Cache.from_config(text, max_tokens=128)
        out = self.model.generate(
            **inputs,
            past_key_values=cache,
            max_new_tokens=STEPS,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
            output_logits=True,
            return_dict_in_generate=True,
        )
        return torch.stack(out.logits, 1).double(), cache


@pytest.fixture(autouse=True, scope="module")
def _fresh_dynamo():
    """Once for all tests here: they share captured graphs."""
    torch._dynamo.reset()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRANSFORMERS_DISABLE_TORCH_CHECK", "1")
        yield


@pytest.fixture(scope="module")
def inputs():
    """Rows of two images each, the second padded."""
    rows = prompt([110, 97], [[5, 60], [3, 50]], PATCHES)
    return {**rows, "pixel_values": pixels(4)}


@pytest.fixture(scope="module")
def model(inputs):
    made = vision_model("llava")
    with torch.no_grad():
        made(**inputs, use_cache=False)  # hooks that would break the graph
    return made


@pytest.fixture(scope="module")
def generate(model):
    return Generating(model)


def same(found, cache, expected, held, first=0):
    """``first``: in the layers before the first drop padding is kept too."""
    assert torch.equal(found.argmax(-1), expected.argmax(-1))
    # Rotary angles are float32, also in a float64 model.
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    counts = [layer.lengths.tolist() for layer in cache.layers]
    assert counts[first:] == held[first:]


def test_must_compacts_every_layer_to_the_final_tokens(model, generate, inputs):
    """`generate` encodes the images before the prefill, so there is no key set."""
    expected, held = greedy(eager(model), inputs, Rule(PLAN), STEPS, final=True)
    assert len({tuple(layer) for layer in held}) == 1
    same(*generate(config("must"), inputs), expected, held)
    assert "no-encoder-stage" in {r.code for r in generate.remarks}


def test_must_by_thresholds(model, generate, inputs):
    """The row that keeps most sets the number, the other adds its next best."""
    rule = Rule(PLAN, thresholds=BOUNDS, by_threshold=True)
    expected, held = greedy(eager(model), inputs, rule, STEPS, final=True)
    assert held[0][0] < 110
    same(*generate(config(THRESHOLD), inputs), expected, held)


@pytest.mark.parametrize("method", ["pool", "fastv"])
def test_other_methods_keep_what_reached_each_layer(model, generate, inputs, method):
    expected, held = greedy(eager(model), inputs, Rule(PLAN, method), STEPS, False)
    assert held[1] > held[2]
    same(*generate(config(method), inputs), expected, held, first=1)


def test_without_an_image_nothing_is_dropped(model, generate):
    rows = prompt([20, 17], [[], []], 0)
    expected, _ = greedy(eager(model), rows, Rule([]), STEPS, final=False)
    found, cache = generate(config("must"), rows)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not cache.has_dropped()
    assert "no-vision" in {r.code for r in generate.remarks}
