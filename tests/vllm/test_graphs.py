"""Passes over vLLM's graphs: tokens equal those of the same rewrite in transformers."""

from __future__ import annotations

import pytest
import torch

from graphopt.calibration import Calibration
from graphopt.calibration.observe import calibrate
from graphopt.models import load
from tests.vllm import reference
from tests.vllm.running import generate
from tests.vllm.tiny import save

PROMPTS = [list(range(3, 60)), [5, 9, 33, 21], [70, 2, 41, 8, 90, 13, 66, 7, 1, 30]]
TOKENS = 8
SPARSITY = 0.7


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    return save(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def plain(tiny):
    return reference.greedy(tiny, PROMPTS, TOKENS)


@pytest.fixture(scope="module")
def thresholds(tiny, tmp_path_factory):
    """Return the path of a calibration of the tiny model."""
    model = load(str(tiny)).model
    generator = torch.Generator().manual_seed(3)
    vocabulary = model.config.vocab_size
    texts = [torch.randint(vocabulary, (1, 60), generator=generator) for _ in range(3)]
    text, _ = calibrate(model, texts).write(
        tmp_path_factory.mktemp("calibration") / "c"
    )
    return text


def mask(method, thresholds):
    options = (
        f'method={method},sparsity={SPARSITY},thresholds="{thresholds}",force=true'
    )
    return {"config": f"neuron-mask{{{options}}}"}


def closed(thresholds):
    found = Calibration.read(thresholds)
    return [found.threshold("gate", name, SPARSITY) for name in sorted(found.gates)]


@pytest.mark.parametrize(
    "parallel",
    [{}, {"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}],
    ids=["one", "tensor", "pipeline"],
)
def test_neurons_with_closed_gates_are_left_out(tiny, plain, thresholds, parallel):
    def edit(model):
        reference.close_gates(model, closed(thresholds))

    expected = reference.greedy(tiny, PROMPTS, TOKENS, edit)
    assert expected != plain
    settings = mask("cats", thresholds)
    assert generate(tiny, settings, PROMPTS, TOKENS, **parallel) == expected


def test_small_inputs_of_all_linears_are_left_out(tiny, plain, thresholds):
    found = Calibration.read(thresholds)
    layers = [n for n in found.inputs if ".layers." in n]

    def edit(model):
        at = {n: found.threshold("input", n, SPARSITY) for n in layers}
        reference.drop_inputs(model, at)

    expected = reference.greedy(tiny, PROMPTS, TOKENS, edit)
    assert expected != plain
    settings = mask("teal", thresholds)
    assert generate(tiny, settings, PROMPTS, TOKENS, tensor_parallel_size=2) == expected


def test_linears_in_int8_and_layers_of_one_weight(tiny, plain):
    """Codes of vLLM's merged projections are those of their parts: a scale a row."""

    def edit(model):
        first, second = model.model.layers
        second.load_state_dict(first.state_dict())
        reference.code_linears(model)

    expected = reference.greedy(tiny, PROMPTS, TOKENS, edit)
    assert expected != plain
    text = "weight-tying{stages=[2]},shadow-outlier{activations=dynamic,weights=memory}"
    assert generate(tiny, {"config": text}, PROMPTS, TOKENS) == expected


def test_a_pass_that_finds_nothing_ends_the_start(tiny):
    with pytest.raises(AssertionError, match="weight-tying rewrote nothing") as error:
        generate(tiny, {"config": "weight-tying{stages=[3]}"}, PROMPTS, TOKENS)
    assert "do not fit the stacks" in str(error.value)
