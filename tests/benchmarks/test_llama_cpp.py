"""The comparison with llama.cpp without llama.cpp: protocol, figures, messages."""

from __future__ import annotations

import json
import sys
from array import array
from pathlib import Path

import pytest
import torch

from benchmarks import llama_cpp_environment as environment
from benchmarks.harness import Seconds, compare
from benchmarks.llama_cpp_client import LlamaCpp
from benchmarks.llama_cpp_rows import DENSE, row, summary
from benchmarks.llama_cpp_worker import SIDES, serve
from graphopt.errors import GraphoptError

# A worker whose logits are the token and how many tokens it has read.
FAKE = f"""
import json, sys
sys.path.insert(0, {str(Path(__file__).parents[2])!r})
from array import array
from benchmarks.llama_cpp_worker import SIDES, serve

class Counting:
    length = 0

    def prefill(self, tokens):
        self.length = len(tokens)

    def decode(self, tokens):
        if len(tokens) > 3:
            raise ValueError("no room")
        for index, token in enumerate(tokens):
            yield array("f", [token, self.length + index]).tobytes()

print(json.dumps({{"version": sys.argv[2:]}}), flush=True)
sides = {{name: Counting() for name in SIDES}}
serve(iter(sys.stdin), sides, lambda a: print(json.dumps(a), flush=True))
"""


@pytest.fixture
def peer(tmp_path):
    worker = tmp_path / "worker.py"
    worker.write_text(FAKE)
    found = LlamaCpp(Path(sys.executable), Path("a.gguf"), 64, 2, worker)
    yield found
    found.close()


def test_a_worker_is_asked_turn_by_turn(peer):
    assert peer.about == {"version": ["64", "2"]}
    prompt, following = torch.arange(9)[None], torch.tensor([[7, 5]])
    assert isinstance(peer.prefill("FA on", prompt), Seconds)
    for _ in range(2):  # what was decoded is forgotten
        logits = peer.logits("FA on", following)
        assert torch.equal(logits, torch.tensor([[7.0, 9.0], [5.0, 10.0]]))
    assert peer.logits("FA off", following)[0, 1] == 0
    seconds = peer.decode("FA on", following)
    assert 0 < seconds.best < 10 and 0 <= seconds.utilisation < 2
    assert peer.peak_mb > 1


def test_a_worker_that_cannot_go_on_says_why(peer):
    with pytest.raises(GraphoptError, match=r"no room.*import llama_cpp"):
        peer.decode("FA on", torch.arange(4)[None])
    with pytest.raises(GraphoptError, match="it ended"):
        peer.prefill("FA on", torch.arange(4)[None])


def test_a_worker_without_llama_cpp():
    with pytest.raises(GraphoptError, match="No module named 'llama_cpp'"):
        LlamaCpp(Path(sys.executable), Path("a.gguf"), 64, 2)


class _Reader:
    def prefill(self, tokens):
        self.tokens = tokens

    def decode(self, tokens):
        yield from (array("f", [token]).tobytes() for token in tokens)


def test_mistakes_are_answers():
    asked = [
        {"do": "sleep", "side": "FA on", "tokens": []},
        {"do": "prefill", "side": "neither", "tokens": []},
        {"do": "prefill", "side": "FA on", "tokens": [1, 2]},
    ]
    said, reader = [], _Reader()
    serve(map(json.dumps, asked), dict.fromkeys(SIDES, reader), said.append)
    assert ["error" in answer for answer in said] == [True, True, False]
    assert "sleep" in said[0]["error"] and "neither" in said[1]["error"]
    assert reader.tokens == [1, 2] and set(said[2]) >= {"seconds", "cpu_seconds"}


def test_a_side_of_another_process_times_itself():
    timed = compare({"far": lambda: Seconds(3.0, 1.0), "near": lambda: None}, runs=1)
    assert timed["far"] == Seconds(3.0, 1.0) and timed["near"].best < 1


def test_figures_are_of_the_best_side_of_each():
    speeds = {"lossless": (10, 90), "int8": (20, 60), DENSE: (99, 99)}
    speeds |= {"FA off": (16, 30), "FA on": (8, 45)}
    rows = []
    for context, slower in ((512, 1), (8000, 2)):
        for side, (decode, prefill) in speeds.items():
            own = slower if side == "int8" else 1
            kl = {"mean_kl": 0.01 * decode}
            rows.append(row(context, "decode", side, 16, Seconds(16 / decode * own, 1)))
            rows[-1] |= kl
            seconds = Seconds(context / prefill, 1)
            rows.append(row(context, "prefill", side, context, seconds))
    assert rows[0]["engine"] == "graphopt" and rows[-1]["engine"] == "llama.cpp"
    assert summary(rows) == {
        "decode_vs_llamacpp": 0.625,
        "decode_vs_llamacpp_512": 1.25,
        "decode_vs_llamacpp_8000": 0.625,
        "decode_kl": 0.2,
        "llamacpp_kl": 0.16,
        "prefill_vs_llamacpp": 2.0,
        "prefill_vs_llamacpp_512": 2.0,
        "prefill_vs_llamacpp_8000": 2.0,
    }


@pytest.mark.parametrize("python", [sys.executable, "/nowhere/python"])
def test_an_interpreter_without_llama_cpp(monkeypatch, python):
    monkeypatch.setenv(environment.VARIABLE, python)
    with pytest.raises(GraphoptError, match="cannot import llama_cpp") as caught:
        environment.interpreter()
    assert f"{python} -m pip install {environment.PACKAGE}" in str(caught.value)


def test_an_environment_that_cannot_be_made(monkeypatch, tmp_path):
    monkeypatch.delenv(environment.VARIABLE, raising=False)
    monkeypatch.setenv("GRAPHOPT_CACHE_DIR", str(tmp_path))
    failing = tmp_path / "python"
    failing.write_text("#!/bin/sh\necho 'error: no venv here'\nexit 1\n")
    failing.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(failing))
    with pytest.raises(GraphoptError, match="no venv here") as caught:
        environment.interpreter()
    said = str(caught.value)
    assert environment.VARIABLE in said and environment.PACKAGE in said
    assert not list(tmp_path.glob("*/complete"))


def test_an_environment_is_made_once(monkeypatch, tmp_path):
    monkeypatch.delenv(environment.VARIABLE, raising=False)
    monkeypatch.setenv("GRAPHOPT_CACHE_DIR", str(tmp_path))
    made = []
    monkeypatch.setattr(environment, "_make", lambda f, p: (f.mkdir(), made.append(p)))
    assert environment.interpreter() == environment.interpreter() == made[0]
    assert len(made) == 1
