"""What is asked of graphopt inside vLLM is checked before a model is built."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from graphopt.errors import ConfigError
from graphopt.integrations.vllm.settings import (
    BACKEND,
    check_attention,
    check_backend,
    read_settings,
)


def config(settings, stages=1, draft=None):
    return SimpleNamespace(
        additional_config={"graphopt": settings} if settings is not None else {},
        parallel_config=SimpleNamespace(pipeline_parallel_size=stages),
        speculative_config=draft,
        model_config=SimpleNamespace(model="served"),
    )


def pair(**more):
    member = {"model": "small", **more}
    return {"pair": [{"tuned": member, "reference": {"model": "other"}}]}


def test_nothing_is_asked_for_and_nothing_is_done():
    found = read_settings(config(None))
    assert not found.options.config.pipeline
    assert not found.attention
    assert found.pairs is None


def test_passes_go_to_the_graph_and_to_attention():
    text = "sparse-attention{window=64},shadow-outlier{activations=dynamic}"
    found = read_settings(config({"config": text}))
    assert [p.name for p in found.attention] == ["sparse-attention"]
    assert [p.name for p in found.options.config.pipeline] == ["shadow-outlier"]


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("neuron-mask{method=core}", "do not tell whose"),
        ("neuron-mask", "do not tell whose"),
        ("token-drop", "cache blocks for all layers alike"),
        ("chunked-prefill", "scheduler"),
        ("packed-prefill", "no padding"),
        ("page-selection{kv_dtype=int8}", "in the model's dtype; leave it out"),
        ("sparse-attention{pattern=vertical-slash}", "a chunk at a time"),
        ("sparse-attention{pattern=antidiagonal}", "a chunk at a time"),
        ("logit-arithmetic", "'ensemble'"),
        ("skinny-linear{force=true}", "every number of rows"),
    ],
)
def test_what_has_no_hook_is_refused_with_the_reason(text, reason):
    with pytest.raises(ConfigError, match=reason):
        read_settings(config({"config": text}))


def test_graphopts_own_parser_checks_the_options():
    with pytest.raises(ConfigError, match="did you mean 'neuron-mask'"):
        read_settings(config({"config": "neuron-masc"}))
    with pytest.raises(ConfigError, match="did you mean 'config'"):
        read_settings(config({"confg": "neuron-mask"}))
    with pytest.raises(ConfigError, match="is a table"):
        read_settings(config("neuron-mask"))


def test_layers_of_a_stage_are_not_those_of_the_model():
    seen = "weight-tying,sparse-attention{layers=[0]}"  # cache layers have their names
    assert read_settings(config({"config": seen}, stages=2)).attention
    text = "shadow-outlier{activations=dynamic,layers=[0]}"
    assert read_settings(config({"config": text})).options.config.pipeline
    with pytest.raises(ConfigError, match="pipeline stages"):
        read_settings(config({"config": text}, stages=2))


def test_a_file_is_named_by_the_environment(tmp_path, monkeypatch):
    file = tmp_path / "passes.toml"
    file.write_text('[[pass]]\nname = "weight-tying"\nstages = [2]\n')
    monkeypatch.setenv("GRAPHOPT_CONFIG", str(file))
    found = read_settings(config(None))
    assert [p.name for p in found.options.config.pipeline] == ["weight-tying"]
    with pytest.raises(ConfigError, match="both say"):
        read_settings(config({"config": "weight-tying"}))


@pytest.mark.parametrize(("mode", "backend"), [(0, BACKEND), (2, "inductor")])
def test_passes_without_graphs_are_an_error(mode, backend):
    given = config({"config": "weight-tying"})
    given.compilation_config = SimpleNamespace(mode=mode, backend=backend)
    with pytest.raises(ConfigError, match=r"hands over no graphs.*-cc\.mode=2"):
        check_backend(read_settings(given), given)
    given.compilation_config = SimpleNamespace(mode=2, backend=BACKEND)
    check_backend(read_settings(given), given)
    without = config({"config": "sparse-attention"})
    without.compilation_config = SimpleNamespace(mode=0, backend="")
    check_backend(read_settings(without), without)


def test_pairs_are_checked():
    found = read_settings(config({"ensemble": {**pair(), "beta": 2.0}}))
    assert found.pairs is not None
    assert found.pairs.config.beta == 2.0
    assert found.pairs.weights.tolist() == [1.0]
    with pytest.raises(ConfigError, match="prompts of members' own"):
        read_settings(config({"ensemble": pair(chat=True)}))
    with pytest.raises(ConfigError, match="'pair"):
        read_settings(config({"ensemble": {"pair": []}}))
    with pytest.raises(ConfigError, match="speculative"):
        read_settings(config({"ensemble": pair()}, draft=object()))


def served(given, block_size=128, connector=None):
    """Return settings, and vLLM's config of a model of 2 layers, 4 heads and 2 of keys.

    Block size and connector are vLLM's.
    """
    made = config({"config": given})
    text = SimpleNamespace(num_hidden_layers=2, num_attention_heads=4)
    made.model_config.hf_text_config = text
    made.model_config.get_total_num_kv_heads = lambda: 2
    made.cache_config = SimpleNamespace(block_size=block_size)
    made.kv_transfer_config = connector
    return read_settings(made), made


def test_pages_are_whole_parts_of_blocks():
    check_attention(*served("page-selection", 64))
    check_attention(*served("page-selection", 128))
    with pytest.raises(ConfigError, match="use --block-size 128"):
        check_attention(*served("page-selection", 96))


def test_keys_that_are_not_written_here_have_no_statistics():
    check_attention(*served("sparse-attention", connector=object()))
    with pytest.raises(ConfigError, match="a KV connector brings"):
        check_attention(*served("page-selection", connector=object()))


def test_tables_of_heads(tmp_path):
    """As a search writes them; patterns that select and other models are refused."""
    rows = [f"[[heads]]\nlayers = [{i}]\nheads = [0]\n" for i in range(2)]
    own, streaming = tmp_path / "own.toml", tmp_path / "gates.tsv"
    own.write_text(f'{rows[0]}pattern = "a-shape"\nwindow = 64\n')
    check_attention(*served(f'sparse-attention{{table="{own}"}}'))
    own = tmp_path / "selecting.toml"
    own.write_text(f'{rows[1]}pattern = "vertical-slash"\n')
    with pytest.raises(ConfigError, match=r"'vertical-slash'.* a chunk at a time"):
        served(f'sparse-attention{{table="{own}"}}')
    streaming.write_text("0.9\t0.1\n0.2\t0.8\n")
    for name in ("sparse-attention", "page-selection"):
        check_attention(*served(f'{name}{{table="{streaming}"}}'))
    wide = tmp_path / "wide.tsv"
    wide.write_text("0.9\t0.1\t0.4\n0.2\t0.8\t0.3\n")
    with pytest.raises(ConfigError, match="3 KV heads in layer 0, the model 2"):
        check_attention(*served(f'page-selection{{table="{wide}"}}'))
