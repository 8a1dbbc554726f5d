"""Ensembles that a TOML file describes."""

from __future__ import annotations

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from graphopt.cli import app
from graphopt.cli.ensemble import EnsembleJob, _measure, sides
from graphopt.ensembles.config import read_config
from graphopt.ensembles.load import load_ensemble
from graphopt.errors import ConfigError, GraphoptError
from tests.ensembles.members import llama
from tests.ensembles.test_lora import pairs, written

CHAT = "{% for m in messages %}w5 {{ m['content'] }} w6{% endfor %}"
PLAIN = """
[base]
model = "large"
[[pair]]
tuned = {model = "tuned"}
reference = {model = "small"}
"""
FULL = """
beta = 0.5
top_p = 0.9
[base]
model = "large"
[[pair]]
weight = 2.0
tuned = {model = "tuned", chat = true, prompt = "w7 {prompt}"}
reference = {model = "small"}
[[pair]]
weight = 1.0
tuned = {model = "small", adapter = "adapter"}
reference = {model = "small"}
"""


def tokenizer(words=100):
    vocabulary = {f"w{i}": i for i in range(words)}
    own = Tokenizer(models.WordLevel(vocabulary, unk_token="w3"))
    own.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=own, chat_template=CHAT)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("members")
    sizes = {"large": (64, 0), "small": (32, 2), "tuned": (32, 1)}
    for name, (hidden, seed) in sizes.items():
        llama(hidden, layers=2, seed=seed).save_pretrained(made / name)
        tokenizer().save_pretrained(made / name)
    (made / "adapter").mkdir()
    written(made / "adapter", pairs(llama(32)), lora_alpha=2)
    return made


def file(folder, text):
    path = folder / "ensemble.toml"
    path.write_text(text)
    return path


def test_members_prompts_and_numbers(folder):
    loaded = load_ensemble(file(folder, FULL))
    made = loaded.model
    assert made.weights.tolist() == [2.0, 1.0] and float(made.beta) == 0.5
    assert float(made.top_p) == pytest.approx(0.9)
    assert len(made.members) == 4 and made.pairs == ((1, 3), (2, 3))
    shared = {id(p) for p in made.members[3].parameters()}
    assert shared < {id(p) for p in made.members[2].parameters()}
    inputs = loaded.inputs("w10 w11")
    assert inputs["inputs"].tolist() == [[10, 11]]
    own, other = inputs["tuned_input_ids"]
    assert own.tolist() == [[5, 7, 10, 11, 6]] and other is None
    assert "reference_input_ids" not in inputs
    assert made.generate(**inputs, max_new_tokens=3, do_sample=False).shape == (1, 5)


def test_the_command_generates(folder):
    path = str(file(folder, PLAIN))
    found = _measure(EnsembleJob("eager", path, "w10 w11 w12", 5))
    loaded = load_ensemble(path)
    ids = loaded.model.generate(torch.tensor([[10, 11, 12]]), max_new_tokens=5)
    assert found.tokens == ids[0, 3:].tolist() and len(found.text.split()) == 5
    assert found.prefill_seconds > 0 and found.decode_tokens_per_second > 0
    assert 0 < found.compile_seconds < 600


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (PLAIN.replace("[base]", "[bose]"), "unknown key 'bose'; did you mean 'base'"),
        (PLAIN.replace('"small"', '"small", chot = true'), "did you mean 'chat'"),
        ("[base]\nmodel = 'x'\n", "the key 'pair' is missing"),
        ("top_p = 2.0\n" + PLAIN, "'top_p'"),
        ("[base", "not valid TOML"),
        (FULL.replace("weight = 1.0\n", ""), "every pair, or to none"),
        (FULL.replace("w7 {prompt}", "w7"), "does not say where"),
    ],
)
def test_mistakes_in_files(folder, text, message):
    with pytest.raises(ConfigError, match=message):
        read_config(file(folder, text))


def test_members_with_other_tokens(folder, tmp_path):
    tokenizer(99).save_pretrained(tmp_path)
    llama(32).save_pretrained(tmp_path)
    text = PLAIN.replace('"tuned"', f'"{tmp_path}"')
    with pytest.raises(ConfigError, match="share a tokenizer"):
        load_ensemble(file(folder, text))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--prompt", "x"], "give either MODEL or --ensemble"),
        (["--ensemble", "no.toml", "--prompt", "x"], "no such file"),
        (["--ensemble", "no.toml", "--prompt", "x", "--raw"], "--raw"),
        (["--ensemble", "no.toml", "--prompt", "x", "--compare", "bose"], "'base'"),
    ],
)
def test_mistakes_in_the_command(arguments, message):
    result = CliRunner().invoke(app, ["run", *arguments])
    assert isinstance(result.exception, GraphoptError)
    assert message in str(result.exception)
    assert sides("base, tuned") == ["base", "tuned"]
