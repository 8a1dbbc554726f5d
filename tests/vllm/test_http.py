"""SmolLM2 rewritten, served over HTTP and asked by the client of OpenAI's package."""

from __future__ import annotations

import pytest

from graphopt.calibration import Calibration
from graphopt.calibration.observe import calibrate
from graphopt.models import load
from tests.vllm import reference
from tests.vllm.running import LIMIT, generate, serving
from tests.vllm.test_pages import PAGES, PROMPTS
from tests.vllm.tiny import save

TEXT = (
    "The river begins in the hills and runs through two towns before it reaches the "
    "sea. People have fished there for centuries, and every spring the water rises."
)
QUESTIONS = ["The capital of France is", "Water boils when", "Once upon a time there"]
STORY = f"{TEXT} " * 8 + "One day"
TOKENS = 10
SELECTION = "page-selection{budget=128}"
SPARSITY = 0.3


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory):
    """Return folders of the model and of its calibration, prompts and the reference."""
    found = load("smollm2")
    root = tmp_path_factory.mktemp("smollm2")
    found.model.save_pretrained(root / "model")
    found.tokenizer.save_pretrained(root / "model")
    ids = found.tokenizer(TEXT, return_tensors="pt").input_ids
    text, _ = calibrate(found.model, [ids]).write(root / "calibration")
    prompts = [found.tokenizer(q).input_ids for q in (*QUESTIONS, STORY)]
    return root / "model", text, prompts


@pytest.fixture(scope="module")
def expected(smollm2):
    model, calibration, prompts = smollm2
    read = Calibration.read(calibration)
    count = len(read.gates)
    names = [f"model.layers.{i}.mlp.down_proj.weight" for i in range(count)]
    at = [read.threshold("gate", name, SPARSITY) for name in names]

    def edit(module):
        reference.close_gates(module, at)

    found = reference.by_steps(model, SELECTION, prompts, TOKENS, edit)
    assert found != reference.greedy(model, prompts, TOKENS, edit)
    # Short prompts' pages are all read: what differs is the closed gates.
    short = prompts[: len(QUESTIONS)]
    assert found[: len(short)] != reference.greedy(model, short, TOKENS)
    return found


def settings(calibration):
    options = f'method=cats,sparsity={SPARSITY},thresholds="{calibration}",force=true'
    return {"config": f"neuron-mask{{{options}}},{SELECTION}"}


def test_two_stages(smollm2, expected):
    model, calibration, prompts = smollm2
    found = generate(
        model, settings(calibration), prompts, TOKENS, pipeline_parallel_size=2
    )
    assert found == expected


def answered(address, prompts, tokens):
    """Return the tokens that OpenAI's client is given."""
    from openai import OpenAI

    with OpenAI(base_url=address, api_key="none", timeout=LIMIT) as client:
        answer = client.completions.create(
            model="it",
            prompt=prompts,
            max_tokens=tokens,
            temperature=0,
            extra_body={"ignore_eos": True, "return_token_ids": True},
        )
    choices = sorted(answer.choices, key=lambda c: c.index)
    return [choice.token_ids for choice in choices]


@pytest.mark.parametrize("stages", ["1", "2"])
def test_the_server_of_one_model(smollm2, expected, stages, tmp_path):
    model, calibration, prompts = smollm2
    flags = ["--pipeline-parallel-size", stages]
    given = settings(calibration)
    with serving(model, given, tmp_path / "log", *flags) as address:
        found = answered(address, prompts, TOKENS)
    assert found == expected


def test_the_server_of_two_ranks(tmp_path):
    """SmolLM2 has nine heads, which two ranks cannot share out."""
    model = save(tmp_path / "tiny")
    expected = reference.by_steps(model, PAGES, PROMPTS, TOKENS)
    flags = ["--tensor-parallel-size", "2"]
    with serving(model, {"config": PAGES}, tmp_path / "log", *flags) as address:
        found = answered(address, PROMPTS, TOKENS)
    assert found == expected
