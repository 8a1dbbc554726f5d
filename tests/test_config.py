"""Pass configs: three spellings of one pipeline, and errors that help."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from graphopt.config import load_config
from graphopt.errors import ConfigError
from graphopt.options import parse_options

A_SHAPE = "sparse-attention{pattern=a-shape,sink=64,window=512}"
EXAMPLES = sorted(Path(__file__).parent.parent.joinpath("examples").glob("*.toml"))


def write(folder, text):
    path = folder / "c.toml"
    path.write_text(text)
    return path


def test_the_default_is_the_lossless_pipeline():
    assert load_config(None).text() == "structured-mask,skinny-linear"


def test_text_dictionary_and_file_agree(tmp_path):
    body = {"name": "sparse-attention", "sink": 64, "window": 512}
    file = write(
        tmp_path,
        'defaults = false\n[[pass]]\nname = "sparse-attention"\n'
        "sink = 64\nwindow = 512\n",
    )
    pipelines = [
        load_config(A_SHAPE).pipeline,
        load_config({"defaults": False, "pass": [body]}).pipeline,
        load_config(file).pipeline,
        load_config(str(file)).pipeline,
    ]
    assert all(p == pipelines[0] for p in pipelines)


def test_files_run_the_lossless_passes_around_their_own(tmp_path):
    file = write(tmp_path, '[[pass]]\nname = "sparse-attention"\n')
    names = [p.name for p in load_config(file).pipeline]
    assert names == ["structured-mask", "sparse-attention", "skinny-linear"]


@pytest.mark.parametrize("empty", ["", {"pass": []}, {"defaults": False}])
def test_the_empty_pipeline(empty):
    assert load_config(empty).pipeline == ()


@given(
    sink=st.integers(0, 9999),
    window=st.integers(1, 9999),
    layers=st.none() | st.lists(st.integers(0, 99), max_size=4),
    pattern=st.sampled_from(["a-shape", "sliding-window"]),
    force=st.booleans(),
)
def test_round_trips(tmp_path_factory, sink, window, layers, pattern, force):
    rule = {"heads": [0, 2], "pattern": "dense"}
    options = {"sink": sink, "window": window, "pattern": pattern, "force": force}
    options |= {"heads": [rule]} | ({} if layers is None else {"layers": layers})
    given = {"defaults": False, "pass": [{"name": "sparse-attention", **options}]}
    config = load_config(given)
    assert load_config(config.text()).pipeline == config.pipeline
    file = write(tmp_path_factory.mktemp("toml"), config.toml())
    assert load_config(file).pipeline == config.pipeline


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda p: p.name)
def test_examples_load(path):
    assert load_config(path).pipeline


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ('[[pass]]\nname = "sparse-atention"', 2, "did you mean 'sparse-attention'"),
        ('[[pass]]\nname = "sparse-attention"\nsnik = 3', 3, "did you mean 'sink'"),
        ('[[pass]]\nname = "sparse-attention"\nwindow = -4', 3, "greater than 0"),
        ('[[pass]]\nname = "sparse-attention"\nwindow = "9"', 3, "valid integer"),
        ('[[pass]]\nname = "sparse-attention"\npattern = "x"', 3, "'a-shape'"),
        ('[[pass]]\nname = "sparse-attention"\nlayers = [-1]', 3, "layers.0"),
        ("[[pass]]\nsink = 3", 1, "has no name"),
        ("[[passs]]\nsink = 3", 1, "did you mean 'pass'"),
        ("[pass]\nsink = 3", 1, "list of tables"),
        ("defaults = 1", 1, "true or false"),
        (
            '[[pass]]\nname = "sparse-attention"\npattern = "streaming"\nsink = 3',
            None,
            "multiples of 64",
        ),
    ],
)
def test_errors_name_file_line_and_remedy(tmp_path, text, line, message):
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as error:
        load_config(path)
    place = str(path) if line is None else f"{path}:{line}: "
    assert place in str(error.value)
    assert message in str(error.value)


def test_malformed_and_missing_files(tmp_path):
    with pytest.raises(ConfigError, match=r"not valid TOML.*line 1"):
        load_config(write(tmp_path, "a = = 3"))
    with pytest.raises(ConfigError, match="cannot read"):
        load_config(tmp_path / "none.toml")
    path = tmp_path / "c.toml"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ConfigError, match="UTF-8"):
        load_config(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("sparse-attention{sink}", "key=value"),
        ("sparse-attention{sink=1,sink=2}", "twice"),
        ("sparse-attention{sink=1", "not closed"),
        ("sparse-attention,,structured-mask", "between two commas"),
        ("strutured-mask", "did you mean 'structured-mask'"),
    ],
)
def test_bad_text(text, message):
    with pytest.raises(ConfigError, match=message):
        load_config(text)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"confg": "x"}, "did you mean 'config'"),
        ({"verify": "numbers"}, "did you mean 'numeric'"),
        ({"strict": 1}, "True or False"),
        ({"max_autotune": True}, "under options"),
        ({"inductor": {"max_autotun": True}}, "did you mean 'max_autotune'"),
        ({"inductor": 3}, "is a dict"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ConfigError, match=message):
        parse_options(options)


def test_modes_are_those_of_inductor():
    assert parse_options({}, "reduce-overhead").inductor["triton.cudagraphs"] is True
    with pytest.raises(ConfigError, match="mode"):
        parse_options({}, "fastest")


@pytest.mark.parametrize(
    ("text", "pair"),
    [
        ("packed-prefill,sparse-attention", "sparse-attention.*behind packed-prefill"),
        ("sparse-attention,packed-prefill", "packed-prefill.*behind sparse-attention"),
        ("chunked-prefill,packed-prefill", "packed-prefill.*behind chunked-prefill"),
        ("chunked-prefill,token-drop", "token-drop.*behind chunked-prefill"),
    ],
)
def test_passes_that_cannot_work_in_this_order(text, pair):
    with pytest.raises(ConfigError, match=f"{pair}: [a-z]"):
        load_config(text)
    load_config("chunked-prefill,sparse-attention")
