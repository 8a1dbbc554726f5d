"""SmolLM2 rewritten, served over HTTP and asked by the client of OpenAI's package."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from contextlib import contextmanager
from socket import socket

import pytest

from graphopt.calibration import Calibration
from graphopt.calibration.observe import calibrate
from graphopt.models import load
from tests.vllm import reference
from tests.vllm.running import BACKEND, LIMIT, generate, started

TEXT = (
    "The river begins in the hills and runs through two towns before it reaches the "
    "sea. People have fished there for centuries, and every spring the water rises."
)
QUESTIONS = ["The capital of France is", "Water boils when", "Once upon a time there"]
TOKENS = 10
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
    prompts = [found.tokenizer(q).input_ids for q in QUESTIONS]
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

    found = reference.greedy(model, prompts, TOKENS, edit)
    assert found != reference.greedy(model, prompts, TOKENS)
    return found


def settings(calibration):
    options = f'method=cats,sparsity={SPARSITY},thresholds="{calibration}",force=true'
    return {"config": f"neuron-mask{{{options}}}"}


def test_two_stages(smollm2, expected):
    model, calibration, prompts = smollm2
    found = generate(
        model, settings(calibration), prompts, TOKENS, pipeline_parallel_size=2
    )
    assert found == expected


@contextmanager
def server(model, given, log):
    with socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "vllm.entrypoints.openai.api_server"]
    command += ["--model", str(model), "--served-model-name", "it", "--port", str(port)]
    command += ["--host", "127.0.0.1", "--dtype", "float32", "--max-model-len", "512"]
    command += ["-cc.mode=2", f"-cc.backend={BACKEND}", "--max-num-seqs", "4"]
    command += ["--additional-config", json.dumps({"graphopt": given})]
    pipes = {"stdin": subprocess.DEVNULL, "stdout": log}
    with started(command, **pipes) as process:
        yield process, f"http://127.0.0.1:{port}/v1"


def connected(process, address):
    """Return a client of the server, once it answers."""
    from openai import APIConnectionError, OpenAI

    client = OpenAI(base_url=address, api_key="none", max_retries=0, timeout=60)
    until = time.monotonic() + LIMIT
    while time.monotonic() < until and process.poll() is None:
        try:
            client.models.list()
        except APIConnectionError:
            time.sleep(1)
        else:
            return client
    raise AssertionError("the server did not start")


def test_the_server_of_one_model(smollm2, expected, tmp_path):
    from transformers import AutoTokenizer

    model, calibration, prompts = smollm2
    with (
        (tmp_path / "log").open("w+") as log,
        server(model, settings(calibration), log) as (process, address),
    ):
        try:
            client = connected(process, address)
        except AssertionError as error:
            log.seek(0)
            raise AssertionError(f"{error}: {log.read()[-6000:]}") from None
        answer = client.completions.create(
            model="it",
            prompt=prompts,
            max_tokens=TOKENS,
            temperature=0,
            extra_body={"ignore_eos": True, "add_special_tokens": False},
        )
    tokenizer = AutoTokenizer.from_pretrained(model)
    texts = [choice.text for choice in sorted(answer.choices, key=lambda c: c.index)]
    assert texts == [tokenizer.decode(ids) for ids in expected]
