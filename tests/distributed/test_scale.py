"""What the cluster's cost says of Llama-3-70B, and what chunks do to its bubbles."""

from __future__ import annotations

import pytest

from benchmarks import scale
from benchmarks.scale_cluster import Cluster, Model, Roofline, Split, fitted
from graphopt.runtime.engine.simulator import Load


def roofline(tp=8, pp=1):
    return Roofline(Model(), Cluster(), Split(tp, pp))


def test_sizes_are_those_of_the_model():
    assert Model().weights == pytest.approx(69.5e9, rel=0.01)  # 70.6 with the embedding
    assert Model().kv_bytes == 327_680


def test_a_decode_reads_the_weights_and_a_prompt_computes():
    one = roofline()
    read = 2 * Model().weights / (8 * 3.35e12 * 0.8)
    small, larger = (one.seconds([Load(0, 1)] * rows) for rows in (1, 100))
    assert read < small == larger < 1.6 * read
    compute = 2 * Model().weights * 2048 / (8 * 989e12 * 0.6)
    assert compute < one.seconds([Load(0, 2048)]) < 1.6 * compute


def test_more_stages_send_more():
    assert roofline(pp=8).seconds([Load(0, 512)]) > roofline().seconds([Load(0, 512)])
    assert roofline(tp=1).seconds([Load(0, 512)]) > 4 * roofline().seconds(
        [Load(0, 512)]
    )


def test_the_fit_is_near():
    assert fitted(roofline(pp=8)).error < 0.15


def test_chunks_leave_fewer_bubbles():
    """SARATHI's claim: micro-batches of equal work do not wait for one another."""
    chunked, whole = (
        scale.simulated(Split(8, 8), name, 256) for name in (scale.CHUNKED, scale.WHOLE)
    )
    assert chunked["bubble_share"] < 0.3 * whole["bubble_share"]
    assert chunked["tokens_per_second"] > whole["tokens_per_second"]


def test_the_summary():
    rows = [
        {"case": "prefill", "tp": tp, "tokens": n, "ratio": 1.0 if tp == 1 else 1.5}
        for tp in (1, 2)
        for n in (512, 2048)
    ]
    rows += [
        scale.simulated(split, name, 64)
        for split in (Split(8, 1), Split(8, 2))
        for name in scale.SCHEDULERS
    ]
    found = scale._summary(rows)
    assert found["prefill_tp2_ratio"] == 1.5 and found["prefill_tokens"] == 2048
    assert found["gpus"] == 16 and found["scaling_perfect"] == 2
    assert 1 < found["scaling_chunked"] <= 2.2
