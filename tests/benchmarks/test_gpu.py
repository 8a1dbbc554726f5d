"""The GPU benchmark where there is no GPU: its refusal, and how it bears failures."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from benchmarks import gpu
from benchmarks.device import timing


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_without_a_device_one_line_says_so():
    command = [sys.executable, "-m", "graphopt", "bench", "gpu", "--quick"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 2
    assert "bench gpu needs a CUDA device" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.fixture
def clock(monkeypatch):
    """Let a side's return value be its milliseconds."""
    monkeypatch.setattr(timing, "milliseconds", lambda side, calls: side())


def test_the_best_of_the_rounds_counts(clock):
    times = iter([9.0, 9.0, 5.0, 7.0])
    assert timing.compare({"graphopt": lambda: next(times)}, "a", []) == {
        "graphopt": 5.0
    }


def test_a_side_that_fails_at_once_or_later_is_none_and_noted(clock):
    def no_kernel():
        raise RuntimeError("No available kernel\nof any kind")

    later = iter([4.0, 4.0, 3.0])

    def out_of_memory():
        try:
            return next(later)
        except StopIteration:
            raise torch.OutOfMemoryError("2 GiB") from None

    sides = {"graphopt": lambda: 2.0, "cudnn": no_kernel, "flash": out_of_memory}
    notes = []
    found = timing.compare(sides, "8 tokens", notes)
    assert found == {"graphopt": 2.0, "cudnn": None, "flash": None}
    assert notes == [
        "8 tokens, cudnn: RuntimeError: No available kernel",
        "8 tokens, flash: OutOfMemoryError: 2 GiB",
    ]


def test_speedup_is_over_the_fastest_dense_side():
    found = {"graphopt": 2.0, "cudnn": 5.0, "flash": 4.0, "flex": 1.0}
    assert timing.row("attention", "a-shape", 8, found)["speedup"] == 2.0
    none = timing.row("attention", "a-shape", 8, {"graphopt": 2.0, "flash": None})
    assert none["speedup"] is None
    assert none["flash_ms"] is None


def test_the_summary_bears_sides_that_failed():
    rows = [
        timing.row("attention", "a-shape", 8, dict.fromkeys(timing.SIDES))
        | {"rate": None},
        timing.row("prefill", "a-shape", 8, {"graphopt": 1.0, "inductor": 3.0}),
        timing.row("compile", "default", 64, {"graphopt": 1.0, "inductor": 4.0}),
    ]
    summary = gpu._summary(rows)
    assert summary["prefill_speedup_8"] == 3.0
    assert summary["compile_ratio"] == 0.25
    assert summary["attention_speedup_8"] is None
    assert summary["attention_over_flex_8"] is None
