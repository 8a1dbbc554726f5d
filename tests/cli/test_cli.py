"""The command line, called as a user calls it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.running import graphopt
from tests.models import TINY

CONFIG = "sparse-attention{sink=4,window=8,force=true}"


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    TINY["llama"]().save_pretrained(folder)
    return folder


def facts(*arguments: str | Path):
    result = graphopt(*arguments, "--json")
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def test_a_process_of_its_own():
    command = [sys.executable, "-m", "graphopt", "explain", "smolm2"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert "smollm2" in result.stderr
    assert "Traceback" not in result.stderr


def test_help_has_an_example():
    assert graphopt("--help").returncode == 0
    for command in ("run", "explain", "diff", "passes", "doctor", "bench"):
        assert "Example" in graphopt(command, "--help").stdout


def test_passes():
    listed = {row["name"] for row in facts("passes")}
    attention = {"page-selection", "sparse-attention", "structured-mask"}
    batching = {"chunked-prefill", "packed-prefill", "ragged-batch", "schedule"}
    linear = {"onednn-linear", "shadow-outlier", "skinny-linear"}
    others = {"logit-arithmetic", "neuron-mask", "token-drop", "weight-tying"}
    assert listed == {*attention, *batching, *linear, *others}
    text = graphopt("passes", "sparse-attention").stdout
    for part in ("MInference", "window", "1024", "tokens", "Refuses when"):
        assert part in text


def test_explain(llama):
    found = facts("explain", llama, "-c", CONFIG, "-n", "64")
    graph = found["graphs"][0]
    assert graph["kind"] == "prefill"
    codes = [r["code"] for r in graph["remarks"] if r["pass_name"]]
    assert codes == ["rewritten"] * 2


def test_explain_code_emits_kernels(llama):
    kernels = facts("explain", llama, "-c", CONFIG, "-n", "64", "--code")["kernels"]
    assert kernels
    assert all(Path(path).exists() for path in kernels)


def test_explain_shows_the_step_that_reads_pages(llama):
    config = "page-selection{budget=128}"
    found = facts("explain", llama, "-c", config, "-n", "640", "--code")
    prefill, step = found["graphs"]
    assert (prefill["kind"], step["kind"]) == ("prefill", "decode")
    (first, _) = step["cost"]
    # Copied, read: three times 640 tokens; chosen: 128, and 80 judged every 4 tokens.
    assert first["mb_before"] / first["mb_after"] == pytest.approx(3 * 640 / (128 + 10))
    assert any("page_attention" in path for path in found["kernels"])


def test_explain_counts_the_tokens_that_live_at_each_layer(llama):
    config = "structured-mask,token-drop{schedule=[{layer=0,keep=0.5}]}"
    found = facts("explain", llama, "-c", config, "-n", "640", "--no-cache")
    first, second, ends = found["graphs"][0]["layers"]
    assert [row["tokens_after"] for row in (first, second)] == [640, 320]
    # Hidden 64, two KV heads of four, FFN 128; both products of attention.
    weights = 2 * 64 * (64 + 2 * 32 + 64 + 3 * 128)
    causal = {n: 4 * 64 * n * (n + 1) / 2 for n in (640, 320)}
    masked = 4 * 64 * 640**2  # a mask tensor: every pair is computed
    for row in (first, second):
        assert row["gflop_before"] == pytest.approx((640 * weights + masked) / 1e9)
    assert first["gflop_after"] == pytest.approx((640 * weights + causal[640]) / 1e9)
    assert second["gflop_after"] == pytest.approx((320 * weights + causal[320]) / 1e9)
    assert ends["gflop_after"] == ends["gflop_before"] == 2 * 64 * 100 / 1e9


def test_diff(llama):
    text = graphopt("diff", llama, "-c", CONFIG, "--layer", "1").stdout
    assert "+%L1.graphopt.attention" in text
    assert "L0.graphopt" not in text
    assert facts("diff", llama, "-c", CONFIG)[0]["pass"] == "sparse-attention"


def test_doctor():
    result = graphopt("doctor")
    assert result.returncode == 0, result.stdout
    assert "torch" in result.stdout


def test_doctor_without_a_cache(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GRAPHOPT_CACHE_DIR", str(tmp_path / "file" / "x"))
    result = graphopt("doctor")
    assert result.returncode == 1
    assert "GRAPHOPT_CACHE_DIR" in result.stdout.replace("\n", " ")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["explain", "smolm2"], "smollm2"),
        (["explain", "./nowhere"], "no such model directory"),
        (["explain", "smollm2", "-c", "sparse-atention"], "sparse-attention"),
        (["explain", "smollm2", "-c", "none.toml"], "cannot read"),
        (["passes", "sparse"], "sparse-attention"),
        (["bench", "atention"], "attention"),
    ],
)
def test_mistakes_are_one_message(arguments, message):
    result = graphopt(*arguments)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert message in result.stderr.replace("\n", " ")


def test_a_cut_off_gguf(tmp_path):
    file = tmp_path / "half.gguf"
    file.write_bytes(b"GGUF" + bytes(100))
    result = graphopt("explain", file)
    assert result.returncode == 2
    assert "cut off or damaged" in result.stderr
    assert "Traceback" not in result.stderr


def test_nan_in_weights(tmp_path):
    model = TINY["llama"]()
    model.model.layers[1].mlp.up_proj.weight.data[3, 4] = float("nan")
    model.save_pretrained(tmp_path)
    result = graphopt("explain", tmp_path)
    assert result.returncode == 2
    assert "layers.1.mlp.up_proj.weight" in result.stderr.replace("\n", "")
