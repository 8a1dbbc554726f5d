"""Tensor parallel: each rank's graph under the passes, against the whole model's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.calibration.observed import observed
from tests.distributed.launch import launch
from tests.models import TINY, token_ids

SCRIPT = str(Path(__file__).parent / "tensor_parallel.py")
SPARSE = (
    "structured-mask,sparse-attention{pattern=vertical-slash,sink=2,window=4,"
    "vertical=3,slash=5,force=true,heads=[{heads=[0],pattern=dense},"
    "{heads=[3],pattern=a-shape,sink=2,window=3}]}"
)
TOKENS = "token-drop{schedule=[{layer=0,keep=0.5}]}"
TIED = "weight-tying{stages=[2]}"
RETURNING = (
    "generate:structured-mask,token-drop{revive=true,schedule=[{layer=0,keep=0.5}]}"
)
PAGES = "generate:page-selection{budget=128}"
CORE = "generate:neuron-mask{min_tokens=0}"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny Llama with four heads and two KV heads, as transformers saves it."""
    path = tmp_path_factory.mktemp("model")
    TINY["llama"]().save_pretrained(path)
    return str(path)


def found(saved, how, *configs):
    results = launch(SCRIPT, saved, how, json.dumps(configs), limit=300)
    return dict(zip(configs, results, strict=True))


@pytest.fixture(scope="module")
def by_transformers(saved):
    """What ranks of a model that transformers shares out found."""
    configs = (f"aot:{SPARSE}", TOKENS, f"!{TOKENS}", TIED)
    return found(saved, "transformers", *configs)


def same(result, sites, collectives):
    """Say that every site was rewritten, and nothing else than on one process."""
    assert result["applied"] == result["alone"] == sites
    assert result["collectives"] == [collectives]  # one graph
    assert result["difference"] < 1e-5
    assert result["effect"] > 1e-2


def test_attention_passes_see_this_ranks_heads(by_transformers):
    # Rows that name heads mean the whole model's: head 0 is rank 0's, head 3 rank 1's.
    same(by_transformers[f"aot:{SPARSE}"], sites=4, collectives=6)


def test_tokens_are_ranked_by_the_heads_of_all_ranks(by_transformers):
    same(by_transformers[TOKENS], sites=1, collectives=7)
    # Without the sum each rank drops other tokens, and nothing else tells.
    control = by_transformers[f"!{TOKENS}"]
    assert control["applied"] == 1 and control["collectives"] == [6]
    assert control["difference"] > 1e-2


def test_layers_read_this_ranks_part_of_others(by_transformers):
    same(by_transformers[TIED], sites=1, collectives=6)


@pytest.fixture(scope="module")
def gated(saved):
    """CATS, with thresholds of the whole model, and decoding kernels behind it."""
    path = Path(saved) / "thresholds"
    observed(TINY["llama"](), token_ids(1, 40, seed=3)).write(path)
    cats = f'neuron-mask{{method=cats,thresholds="{path}.toml",force=true}}'
    return f"generate:{cats},skinny-linear"


@pytest.fixture(scope="module")
def generations(saved, gated):
    return found(saved, "transformers", gated, RETURNING, PAGES, CORE)


def same_tokens(result, collectives):
    """Say that a generation is that of the whole model under the same passes."""
    assert result["tokens"] == result["tokens_alone"]
    assert result["difference"] < 1e-5
    assert result["collectives"] == [collectives] * 2  # a prompt's graph and a step's


def test_generation_with_a_cache(generations, gated):
    for config, collectives in ((gated, 6), (RETURNING, 7)):
        result = generations[config]
        same_tokens(result, collectives)
        assert result["applied"] == result["alone"] > 0
        assert result["effect"] > 1e-2
    pages = generations[PAGES]  # whose budget is not reached
    same_tokens(pages, 6)
    assert pages["applied"] == 2


def test_a_choice_among_all_neurons_is_refused(generations):
    result = generations[CORE]
    same_tokens(result, 6)
    assert result["codes"] == ["sharded"]
    assert "it chooses over neurons" in result["said"][0]


def test_torchs_own_plan(saved):
    results = found(saved, "torch", f"aot:{SPARSE}", TOKENS)
    same(results[f"aot:{SPARSE}"], sites=4, collectives=4)
    same(results[TOKENS], sites=1, collectives=5)
