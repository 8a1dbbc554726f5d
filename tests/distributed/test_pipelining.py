"""Stages on real processes give what the whole model gives in one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.distributed.launch import launch

SCRIPT = str(Path(__file__).parent / "pipelining.py")
SPARSE = "sparse-attention{pattern=a-shape,sink=4,window=16,force=true}"
NEURONS = "neuron-mask{keep=0.4,min_tokens=0,layers=[0,1],force=true}"


def run(ranks=2, **job):
    return launch(SCRIPT, json.dumps(job), ranks=ranks, limit=240)


def check_ragged(found, graphs=1):
    assert found["difference"] < 1e-5
    assert found["rows"] == 9 and found["graphs"] == graphs
    assert found["generated"], "the engine writes what the model writes alone"
    large, twice = found["refused"]
    assert "66 tokens, and the largest bucket has 65" in large
    assert "a request is in two micro-batches" in twice


def check_requests(found):
    assert found["changed"] >= 1
    assert found["difference"] < 1e-5
    assert found["effect"] > 1e-2
    assert found["released"] > 0


def test_chunks_decodes_and_passes():
    found = run(ragged=[""], requests=[SPARSE, NEURONS])
    check_ragged(found["ragged"][0])
    # One of two layers, two KV heads, 16 pages of 64 tokens, 16 channels, float32.
    assert found["ragged"][0]["page_bytes"] == 2 * 16 * 64 * 16 * 4
    for requests in found["requests"]:
        check_requests(requests)


def test_interleaved_stages():
    """Two stages on each rank."""
    found = run(per_rank=2, layers=4, ragged=[""])
    check_ragged(found["ragged"][0])


def test_compiled():
    found = run(host="inductor", ragged=[""])
    check_ragged(found["ragged"][0])


@pytest.mark.parametrize("config", [SPARSE])
def test_heads_shared_out_within_stages(config):
    """Two ranks a stage, two stages: TP x PP."""
    found = run(ranks=4, tp=2, ragged=[""], requests=[config])
    check_ragged(found["ragged"][0])
    check_requests(found["requests"][0])
