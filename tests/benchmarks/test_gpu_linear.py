"""The rows of linears on a GPU, on a CPU: every side runs and has a figure."""

from __future__ import annotations

import pytest
import torch

from benchmarks import gpu_linear


@pytest.fixture
def _on_a_cpu(monkeypatch):
    """Each side runs once and takes a millisecond, the dense one two."""

    def compare(sides, label, notes):
        assert all(run() is not None for run in sides.values()), label
        return {name: 2.0 if name == "cublas" else 1.0 for name in sides}

    monkeypatch.setattr(gpu_linear, "compare", compare)
    monkeypatch.setattr(gpu_linear, "DEVICE", "cpu")
    monkeypatch.setattr(gpu_linear, "SHAPES", {"up": (96, 64)})
    monkeypatch.setattr(gpu_linear, "_BYTES", 3 * 96 * 64 * 2)
    monkeypatch.setattr(gpu_linear, "_Captured", lambda run: run)
    monkeypatch.setattr(gpu_linear, "quantize", torch.ops.graphopt.quantize)


@pytest.mark.usefixtures("_on_a_cpu")
def test_rows_and_summary():
    rows = list(gpu_linear.linear_rows((40,), (1, 4), []))
    assert [(r["what"], r["tokens"]) for r in rows] == [
        ("int8", 40),
        ("gemv", 1),
        ("gemv", 4),
    ]
    assert rows[0]["speedup"] == 2.0
    assert rows[0]["tops"] == round(2 * 40 * 96 * 64 / 1e9, 1)
    assert rows[1]["graphopt_ms"] == 0.3333  # of three matrices
    assert rows[1]["cublas_gb_s"] == round(3 * 96 * 64 * 2 / 2e6, 1)
    summary = gpu_linear.linear_summary(rows)
    assert summary == {"int8_speedup_up": 2.0, "gemv_speedup_up": 2.0}


@pytest.mark.usefixtures("_on_a_cpu")
def test_outliers_are_as_many_as_said():
    torch.manual_seed(0)
    x = gpu_linear._with_outliers(torch.randn(4000, 1000))
    beyond = x.abs() > 4
    assert int(beyond.any(0).sum()) == round(gpu_linear.OUTLIERS * 1000)
    share = float(beyond.any(0).float().mean()) * gpu_linear.BEYOND
    assert float(beyond.float().mean()) == pytest.approx(share, rel=0.2)
