"""``graphopt search``, called as a user calls it."""

from __future__ import annotations

import pytest

from tests.cli.running import graphopt
from tests.models import TINY


def search(*arguments):
    return graphopt("search", *arguments)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    TINY["llama"]().save_pretrained(folder)
    return folder


def test_help_has_an_example():
    assert "Example" in search("--help").stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("smolm2",), "did you mean 'smollm2'"),
        (("smollm2", "--gates", "--budget", "0.3"), "leave --budget and --sizes out"),
        (("smollm2", "--out", "no/folder/heads.toml"), "there is no folder no/folder"),
        (("smollm2", "--text", "no.txt"), "--text no.txt: cannot be read"),
        (("smollm2", "--dtype", "int3"), "--dtype int3: unknown"),
    ],
)
def test_mistakes_are_one_message(arguments, message):
    result = search(*arguments)
    assert result.returncode == 2
    assert message in " ".join(result.stderr.split())
    assert "Traceback" not in result.stderr


def test_a_model_without_tokenizer(llama):
    result = search(llama, "--tokens", 200)
    assert result.returncode == 2
    assert "no tokenizer beside the model" in result.stderr
