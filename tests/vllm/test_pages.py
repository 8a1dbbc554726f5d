"""Decoded tokens read some pages of vLLM's cache: those that `graphopt.Cache` reads."""

from __future__ import annotations

import pytest

from tests.vllm import reference
from tests.vllm.running import generate
from tests.vllm.tiny import save

# The fourth shares full blocks with the first, which has ended when it begins.
LONG = list(range(1, 91)) * 4
PROMPTS = [LONG[:310], [5, 9, 33, 21], LONG[30:283], [*LONG[:290], 7, 3]]
TOKENS = 20
PAGES = "page-selection{budget=192,interval=3,statistics=extremes}"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return save(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def plain(model):
    return reference.greedy(model, PROMPTS, TOKENS)


@pytest.fixture(scope="module")
def tables(tmp_path_factory):
    """Return a config with tables of heads: one for prompts, one of streaming heads."""
    root = tmp_path_factory.mktemp("tables")
    prompts, gates = root / "prompts.toml", root / "gates.tsv"
    rows = ["layers = [0]\nheads = [1, 2]\nwindow = 100", "layers = [1]\nwindow = 180"]
    prompts.write_text("".join(f"[[heads]]\n{row}\n" for row in rows))
    gates.write_text("0.9\t0.2\n0.8\t0.7\n")
    rings = f'table="{gates}",sparsity=0.25,sink=64,local=64'
    return (
        f'sparse-attention{{table="{prompts}",window=400,force=true}},'
        f"page-selection{{budget=192,interval=3,{rings}}}"
    )


@pytest.mark.parametrize(
    "parallel",
    [{}, {"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}],
    ids=["one", "tensor", "pipeline"],
)
def test_tables_of_heads(model, plain, tables, parallel):
    """Linears in oneDNN's layout change nothing; chunks of 96 tokens."""
    expected = reference.by_steps(model, tables, PROMPTS, TOKENS)
    assert expected != plain
    settings = {"config": f"{tables},onednn-linear"}
    how = {"max_num_seqs": 3, "max_num_batched_tokens": 96, **parallel}
    assert generate(model, settings, PROMPTS, TOKENS, **how) == expected


def test_pages_alone(model, plain):
    expected = reference.by_steps(model, PAGES, PROMPTS, TOKENS)
    assert expected != plain
    how = {"max_num_seqs": 3, "block_size": 64}
    assert generate(model, {"config": PAGES}, PROMPTS, TOKENS, **how) == expected
    # A budget that covers everything changes nothing.
    wide = {"config": "page-selection{budget=512}"}
    assert generate(model, wide, PROMPTS, TOKENS, **how) == plain
