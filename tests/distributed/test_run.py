"""``graphopt run`` under torchrun: one report, or one clear error on every rank."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import transformers as tf
from tokenizers import Tokenizer, models, pre_tokenizers

from graphopt.cli.split import Split
from graphopt.distributed.ranks import differences
from graphopt.errors import ConfigError
from tests.distributed.launch import torchrun

SCRIPT = str(Path(__file__).parent / "one_differs.py")
PROMPT = "5 6 7 8 9 10 11 12"
SIZES = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1}


def save(folder, **heads):
    """Save a tiny Llama whose tokens are numbers."""
    torch.manual_seed(0)
    config = tf.LlamaConfig(**SIZES, vocab_size=100, **heads)
    tf.LlamaForCausalLM(config).save_pretrained(folder)
    words = models.WordLevel({str(i): i for i in range(100)}, unk_token="0")
    tokenizer = Tokenizer(words)
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tf.PreTrainedTokenizerFast(tokenizer_object=tokenizer).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2}
    return save(tmp_path_factory.mktemp("model"), **heads)


def run(*command, limit=200.0):
    asked = ("--tp", "2", "--prompt", PROMPT, "--max-new-tokens", "4")
    return torchrun(*command, *asked, limit=limit)


def errors(done):
    """Return what the ranks printed as errors, one a rank, in any order."""
    assert done.code != 0, str(done)
    lines = done.stderr.splitlines()
    return [x.removeprefix("error:").strip() for x in lines if x.startswith("error:")]


@pytest.mark.slow
def test_two_ranks_print_one_report(model):
    config = "structured-mask,sparse-attention{sink=2,window=3,force=true}"
    done = run("-m", "graphopt", "run", model, "-c", config, "--json", limit=400)
    assert done.code == 0, str(done)
    (line,) = done.stdout.splitlines()
    found = json.loads(line)
    assert found["results"][0]["tokens"] == greedy(model, window=3, sink=2)
    counts = {(r["pass"], r["kind"]): r["count"] for r in found["remarks"]}
    assert counts["sparse-attention", "applied"] == 1
    assert {"local", "sharded"} & {r["code"] for r in found["remarks"]} == {"local"}


def greedy(path, window, sink):
    """Return four tokens of the whole model whose prompt sees what the pattern has."""
    whole = tf.AutoModelForCausalLM.from_pretrained(path).eval()
    ids = [int(word) for word in PROMPT.split()]
    place = torch.arange(len(ids))
    distance = place[:, None] - place
    seen = (distance >= 0) & ((distance < window) | (place < sink))
    cache, fed, mask = None, torch.tensor([ids]), seen[None, None]
    tokens = []
    with torch.no_grad():
        for _ in range(4):
            out = whole(fed, attention_mask=mask, past_key_values=cache, use_cache=True)
            cache, mask = out.past_key_values, None
            tokens.append(int(out.logits[0, -1].argmax()))
            fed = torch.tensor([tokens[-1:]])
    return tokens


def test_ranks_that_run_something_else(model, tmp_path):
    other = save(tmp_path, num_attention_heads=2, num_key_value_heads=2)
    said = errors(run(SCRIPT, "differs", "run", f"{model},{other}"))
    assert len(said) == 2 and said[0] == said[1]
    assert "graphopt is 0.1.0 on rank 0, 0.0.9 on rank 1" in said[0]
    for part in ("the config is", "the model's configuration is", "start all of them"):
        assert part in said[0]


def test_a_rank_that_dies(model):
    said = errors(run(SCRIPT, "dies", "run", model))
    (message,) = said
    assert "rank 0" in message
    assert "lost another rank" in message or "another rank ended" in message


def test_a_rank_that_never_comes(model):
    done = run(SCRIPT, "hangs", "run", model, "--rank-timeout", "5")
    said = errors(done)
    assert any("lost another rank" in m and "--rank-timeout" in m for m in said)
    assert any("stopped by torchrun" in m for m in said)


def test_processes_as_many_as_asked_for(monkeypatch):
    monkeypatch.setattr("sys.argv", ["graphopt", "run", "m", "--tp", "2"])
    remedy = "torchrun --nproc-per-node 2 -m graphopt run m --tp 2"
    with pytest.raises(ConfigError, match=rf"2 process.* and 1 run; .*{remedy}"):
        Split(2, 1, 60.0).check(ensemble=False, stdin=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    Split(2, 1, 60.0).check(ensemble=False, stdin=False)
    with pytest.raises(ConfigError, match=r"1 process.* and 2 run; .*: graphopt run"):
        Split(1, 1, 60.0).check(ensemble=False, stdin=False)
    with pytest.raises(ConfigError, match="4 process"):
        Split(2, 2, 60.0).check(ensemble=False, stdin=False)
    with pytest.raises(ConfigError, match="stdin"):
        Split(2, 1, 60.0).check(ensemble=False, stdin=True)


def test_differences_name_ranks_and_values():
    same, other = {"torch": "2.13", "split": (2, 1)}, {"torch": "2.12", "split": (2, 1)}
    assert differences([same, same]) == ""
    told = differences([same, other, same])
    assert told == "torch is 2.13 on ranks 0, 2, 2.12 on rank 1"
