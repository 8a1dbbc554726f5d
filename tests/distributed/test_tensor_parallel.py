"""Tensor parallel: each rank's graph under the passes, against the whole model's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from graphopt.runtime.neurons.clusters import Clusters
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
BY_TORCH = f"torch:{SPARSE},{TOKENS}"
RETURNING = (
    "generate:structured-mask,token-drop{revive=true,schedule=[{layer=0,keep=0.5}]}"
)
POINTS = "schedule=[{layer=0,keep=0.4}]"
MUST = f"vision:token-drop{{method=must,{POINTS}}}"
BY_DATA = "mode=threshold,global_threshold=0.03,individual_threshold=0.06"
MUST_BY_DATA = f"vision:token-drop{{method=must,{BY_DATA},{POINTS}}}"
NEURONS = "neuron-mask{keep=0.5,min_tokens=0"
CORE = f"generate:{NEURONS},layers=[0,1],buffers=int8,refresh=2}}"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny Llama with four heads and two KV heads, as transformers saves it."""
    path = tmp_path_factory.mktemp("model")
    TINY["llama"]().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def paged(saved):
    """Pages, by a table of heads: rank 0 has the one that streams in layer 0, rank 1
    that of layer 1; in layer 0 the neurons of the nearest cluster of texts, in layer 1
    those over a threshold of the whole model; and decoding kernels.
    """
    (saved / "gates.tsv").write_text("0.1\t0.9\n0.8\t0.2\n")
    shares = torch.rand((2, 2, 128), generator=torch.Generator().manual_seed(5))
    # All that the first cluster chooses is rank 1's, all of the second rank 0's.
    shares[:, 0, :64] *= 0.01
    shares[:, 1, 64:] *= 0.01
    Clusters(dict(enumerate(shares))).write(saved / "clusters.toml")
    table = f'table="{saved}/gates.tsv",sink=0,local=64'
    nearest = f'layers=[0],mode=similarity,clusters="{saved}/clusters.toml"'
    observed(TINY["llama"](), token_ids(1, 40, seed=3)).write(saved / "thresholds")
    gates = f'method=cats,layers=[1],thresholds="{saved}/thresholds.toml"'
    passes = (
        f"page-selection{{budget=128,{table}}}",
        f"{NEURONS},{nearest},force=true}}",
        f"neuron-mask{{{gates},force=true}}",
        "skinny-linear",
    )
    return f"generate:{','.join(passes)}"


@pytest.fixture(scope="module")
def found(saved, paged):
    """What the ranks found under every config: processes are slow to start."""
    predicted = (BY_TORCH, TOKENS, f"!{TOKENS}", TIED, f"aot:{SPARSE}")
    configs = (*predicted, RETURNING, paged, CORE, MUST, MUST_BY_DATA)
    # Placeholders of images and layers come into one graph.
    env = {"TRANSFORMERS_DISABLE_TORCH_CHECK": "1"}
    results = launch(SCRIPT, str(saved), json.dumps(configs), limit=300, env=env)
    return dict(zip(configs, results, strict=True))


def same(result, sites, collectives):
    """Say that every site was rewritten, and nothing else than on one process."""
    assert result["applied"] == result["alone"] == sites
    assert result["collectives"] == [collectives]  # one graph
    assert result["difference"] < 1e-5
    assert result["effect"] > 1e-2


def test_attention_passes_see_this_ranks_heads(found):
    # Rows that name heads mean the whole model's: head 0 is rank 0's, head 3 rank 1's.
    same(found[f"aot:{SPARSE}"], sites=4, collectives=6)


def test_tokens_are_ranked_by_the_heads_of_all_ranks(found):
    same(found[TOKENS], sites=1, collectives=7)
    # Without the sum each rank drops other tokens, and nothing else tells.
    control = found[f"!{TOKENS}"]
    assert control["applied"] == 1 and control["collectives"] == [6]
    assert control["difference"] > 1e-2


def test_layers_read_this_ranks_part_of_others(found):
    same(found[TIED], sites=1, collectives=6)


def test_torchs_own_plan(found):
    same(found[BY_TORCH], sites=5, collectives=5)


def test_vision_tokens_are_judged_by_the_heads_of_all_ranks(found):
    for config in (MUST, MUST_BY_DATA):
        same(found[config], sites=1, collectives=7)


def same_tokens(result, *collectives):
    """Say that a generation is that of the whole model under the same passes."""
    assert result["tokens"] == result["tokens_alone"]
    assert result["difference"] < 1e-5
    assert result["collectives"] == list(collectives)  # of each graph: a prompt's first
    assert result["effect"] > 1e-2


def test_tokens_return_as_all_heads_ask_for_them(found):
    same_tokens(found[RETURNING], 7, 7)
    assert found[RETURNING]["applied"] == found[RETURNING]["alone"] == 2


def test_core_neurons_are_chosen_among_those_of_all_ranks(found):
    # Both layers gather what the prompt, and a dense step, activate, and agree on the
    # scales of the down projections; other steps exchange nothing for it.
    same_tokens(found[CORE], 10, 6, 10)
    assert found[CORE]["applied"] == found[CORE]["alone"] == 6


def test_pages_clusters_and_thresholds_are_this_ranks(found, paged):
    result = found[paged]
    same_tokens(result, 7, 6)
    # A step's linears over the core are no plain ones, for which there are kernels.
    assert result["applied"] == result["alone"] - 3 == 16
    # A rank's only KV head has all pages in one of the layers, and reads some.
    assert result["pages"] == [2, 3]
