"""The benchmarks over many prompts, on a tiny model."""

from __future__ import annotations

import pytest
import torch

from benchmarks import packing, serving
from benchmarks.lengths import log_uniform
from tests.runtime.engine.dense_executor import DenseExecutor


def test_lengths_are_spread_by_their_logarithm():
    lengths = log_uniform(400, 32, 2048, seed=0)
    assert lengths[0] == max(lengths) == 2048
    assert min(lengths) >= 32
    assert 0.4 < sum(n < 256 for n in lengths) / 400 < 0.6  # the middle is 256
    assert lengths == log_uniform(400, 32, 2048, seed=0)


def test_texts_are_padded_on_the_left():
    batch = packing.padded([torch.tensor([5, 6, 7]), torch.tensor([8])])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [0, 0, 8]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]


@pytest.mark.parametrize("scheduler", serving.SCHEDULERS)
def test_requests_are_served_as_they_arrive(scheduler):
    executor = DenseExecutor(40)
    executor.rows = 3
    prompts = [[7] * 9, [8] * 30, [9] * 2]
    row = serving.row_of(executor, scheduler, prompts, 50.0, 4)
    assert row["tokens_per_second"] > 0 and row["steps"] >= 4
    assert 0 < row["ttft_p50"] <= row["ttft_p99"]
    assert 0 < row["tbt_p50"] <= row["tbt_p99"]


def test_arrivals():
    assert serving.arrivals_of(3, None) == [0.0, 0.0, 0.0]
    times = serving.arrivals_of(2000, 4.0)
    assert times == sorted(times) and times[0] == 0.0
    assert times[-1] == pytest.approx(2000 / 4.0, rel=0.1)
