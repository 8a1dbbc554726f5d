"""Stages on real processes give what the whole model gives in one."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers

from tests.distributed.launch import launch, torchrun

pytestmark = pytest.mark.slow
SCRIPT = str(Path(__file__).parent / "pipelining.py")
SPARSE = "sparse-attention{pattern=a-shape,sink=4,window=16,force=true}"
NEURONS = "neuron-mask{keep=0.4,min_tokens=0,layers=[0,1],force=true}"


def run(*jobs, ranks=2):
    return launch(SCRIPT, *map(json.dumps, jobs), ranks=ranks, limit=300)


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
    # A layer, the last norm and the head, in float32: rank 0 runs the other layer.
    assert found["released"] == (12_288 + 24_576 + 2 * 64 + 64 + 100 * 64) * 4
    assert found["page_bytes"] == [2 * 3 * 64 * 16 * 4, 0]


def test_two_ranks():
    """Pipelines of the same two processes, one after the other."""
    whole = {"ragged": [""], "requests": [SPARSE, NEURONS], "device": "cpu"}
    interleaved = {"ragged": [""], "per_rank": 2, "layers": 4}
    differing = {"differs": ["skinny-linear"], "device": "cpu"}
    compiled = {"ragged": [""], "host": "inductor"}
    passes, stages, errors, code = run(whole, interleaved, differing, compiled)
    for found in (passes, stages, code):
        check_ragged(found["ragged"][0])
    # One of two layers, two KV heads, 16 pages of 64 tokens, 16 channels, float32.
    assert passes["ragged"][0]["page_bytes"] == 2 * 16 * 64 * 16 * 4
    for requests in passes["requests"]:
        check_requests(requests)
    check_errors(*errors["differs"])


def check_errors(found):
    """Ranks that were given different things say so."""
    assert "RanksError" in found["buckets"]
    assert "the buckets is (16, 24) on rank 0, (16, 25) on rank 1" in found["buckets"]
    assert "the config is 'skinny-linear" in found["config"]
    assert "unknown pass" in found["bad"] and "on rank 1" in found["bad"]


def test_heads_shared_out_within_stages():
    """Two ranks a stage, two stages: TP x PP; no rank shares out a tied head."""
    (found,) = run({"tp": 2, "tied": True, "ragged": [""], "device": "cpu"}, ranks=4)
    check_ragged(found["ragged"][0])


def test_run_with_stages(tmp_path):
    """The command line sends one prompt through two stages, beside eager ones."""
    model, prompt = saved(tmp_path), "5 6 7 8 9 10 11 12"
    asked = ("run", str(tmp_path), "--pp", "2", "--prompt", prompt, "--json")
    more = ("--max-new-tokens", "4", "--compare", "eager")
    done = torchrun("-m", "graphopt", *asked, *more, limit=400)
    assert done.code == 0, str(done)
    (line,) = done.stdout.splitlines()
    eager, ours = json.loads(line)["results"]
    ids = torch.tensor([[int(word) for word in prompt.split()]])
    written = model.generate(ids, max_new_tokens=4, do_sample=False)
    assert eager["tokens"] == ours["tokens"] == written[0, ids.shape[1] :].tolist()
    assert ours["mean_kl"] < 1e-8


def saved(folder):
    """Save a tiny Llama of two layers whose tokens are numbers, and return it."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = tf.LlamaConfig(**sizes, num_attention_heads=4, vocab_size=100)
    model = tf.LlamaForCausalLM(config).eval()
    model.save_pretrained(folder)
    words = models.WordLevel({str(i): i for i in range(100)}, unk_token="0")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return model
