"""Golden graph diffs of every pass on many architectures, refusals included."""

from __future__ import annotations

import pytest
import torch

from graphopt.graph_diff import reports_of
from tests.models import CAUSAL, TINY, WINDOW, padding_mask, token_ids

A_SHAPE = "sparse-attention{sink=4,window=8,force=true}"
VERTICAL_SLASH = (
    "sparse-attention{pattern=vertical-slash,sink=2,window=4,vertical=3,slash=5,"
    "force=true,heads=[{heads=[0],pattern=dense}]}"
)
BLOCKS = (
    "sparse-attention{pattern=antidiagonal,sink=2,window=4,force=true,"
    "heads=[{heads=[0],pattern=block-sparse,blocks=3},{heads=[1],stride=4,"
    "threshold=0.5},{heads=[2],pattern=vertical-slash,vertical=3,slash=5}]}"
)
LOSSLESS = "structured-mask"


@pytest.mark.parametrize("name", CAUSAL)
def test_sparse_attention(graph_diff, name):
    inputs = {"input_ids": token_ids(1, 32), "use_cache": True}
    graph_diff(TINY[name](), A_SHAPE, f"sparse-attention-{name}", layer=1, **inputs)


@pytest.mark.parametrize(
    "name", ["llama", "gpt2", "gemma3", "gpt_neox", "mixtral", "bloom"]
)
def test_vertical_slash(graph_diff, name):
    inputs = {
        "input_ids": token_ids(2, 24),
        "attention_mask": padding_mask([24, 17], 24),
        "use_cache": True,
    }
    golden = f"vertical-slash-{name}"
    graph_diff(TINY[name](), VERTICAL_SLASH, golden, layer=1, **inputs)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma3"])
def test_block_lists(graph_diff, name):
    inputs = {
        "input_ids": token_ids(2, 24),
        "attention_mask": padding_mask([24, 17], 24),
        "use_cache": True,
    }
    golden = f"block-lists-{name}"
    graph_diff(TINY[name](), BLOCKS, golden, layer=1, **inputs)


@pytest.mark.parametrize("name", CAUSAL)
def test_structured_mask(graph_diff, name):
    inputs = {
        "input_ids": token_ids(2, 24),
        "attention_mask": padding_mask([24, 17], 24),
        "use_cache": False,
    }
    graph_diff(TINY[name](), LOSSLESS, f"structured-mask-{name}", layer=1, **inputs)


@pytest.mark.parametrize("name", ["bert", "vit"])
def test_encoders_are_left_alone(graph_diff, name):
    inputs = {"input_ids": token_ids(1, 16)}
    if name == "vit":
        inputs = {"pixel_values": torch.rand(1, 3, 32, 32)}
    text = graph_diff(TINY[name](), A_SHAPE, f"sparse-attention-{name}", **inputs)
    assert "[not-causal]" in text
    assert "graphopt.attention(" not in text


def test_short_prompts_stay_dense(graph_diff):
    inputs = {"input_ids": token_ids(1, 2 * WINDOW)}
    config = "sparse-attention{sink=4,window=8}"
    model = TINY["llama"]()
    text = graph_diff(model, config, "too-short", dynamic=False, **inputs)
    assert "[too-short]" in text
    assert "graphopt.attention(" not in text


def test_a_missing_golden_file_fails(pytester):
    # What the runs inside import is forgotten, and some of it cannot be had twice.
    reports_of(torch.nn.Linear(4, 3), LOSSLESS, {"input": torch.rand(2, 4)})
    pytester.makepyfile(
        """
        import torch
        def test_one(graph_diff):
            model = torch.nn.Linear(4, 3)  # of no layers: what is tested are the files
            graph_diff(model, "structured-mask", "one", input=torch.rand(2, 4))
        """
    )
    missing = pytester.runpytest_inprocess()
    missing.assert_outcomes(failed=1)
    missing.stdout.fnmatch_lines(["*no golden file*"])
    pytester.runpytest_inprocess("--update-graphs").assert_outcomes(passed=1)
    pytester.runpytest_inprocess().assert_outcomes(passed=1)
    golden = pytester.path / "golden" / "one.diff"
    golden.write_text(golden.read_text().replace("missed", "lost"))
    pytester.runpytest_inprocess().assert_outcomes(failed=1)


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_packed_prefill(graph_diff, name):
    inputs = {
        "input_ids": token_ids(3, 24),
        "attention_mask": padding_mask([24, 3, 17], 24),
        "use_cache": True,
        "logits_to_keep": 1,
    }
    graph_diff(TINY[name](), "packed-prefill", f"packed-prefill-{name}", **inputs)


@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_chunked_prefill(graph_diff, name):
    inputs = {"input_ids": token_ids(1, 24), "use_cache": True, "logits_to_keep": 1}
    config = "chunked-prefill{chunk=8}"
    graph_diff(TINY[name](), config, f"chunked-prefill-{name}", **inputs)
