"""The Triton kernel and what is compiled around it, on a CUDA device."""

from __future__ import annotations

import itertools

import pytest
import torch

import graphopt
from graphopt.codegen.targets import present, tiles
from graphopt.codegen.triton import attention as triton_attention
from graphopt.codegen.triton import tune
from graphopt.ops import attention
from tests.codegen.triton.cases import FACTORS, SINGLE, Case, check
from tests.codegen.triton.pairwise import pairwise
from tests.models import TINY, token_ids
from tests.oracle import TOLERANCE, assert_close, oracle, tensors, visible

DEVICE = "cuda"
CASES = [Case(**c) for c in pairwise(FACTORS | {"tile": (None,)})]
LONG = Case(dtype=torch.bfloat16, dim=128, group=4, kv_heads=2, length=3000)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def default_tile(spec, kernel, arguments, query, kv_len):
    """The table's first: measuring every case would compile three kernels each."""
    width = max(spec.head_dim, spec.value_dim)
    return tiles(present(query.device), width, spec.dtype, query.shape[2])[0]


@pytest.mark.parametrize("case", [*SINGLE, *CASES], ids=str)
def test_cases(case, monkeypatch):
    monkeypatch.setattr(triton_attention, "choose_tile", default_tile)
    check(case, DEVICE)


def test_a_tile_is_measured_once_and_kept(kernel_cache, monkeypatch):
    monkeypatch.setattr(tune, "_chosen", {})
    check(LONG, DEVICE)
    assert len(list((kernel_cache / "tiles").iterdir())) == 1
    # As in a later process; to measure again would call None.
    monkeypatch.setattr(tune, "_chosen", {})
    monkeypatch.setattr(tune, "_fastest", None)
    check(LONG, DEVICE)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("dim", [64, 128, 256])
def test_every_tile_of_the_table(dim, dtype, monkeypatch):
    from triton.runtime.errors import OutOfResources

    case = Case(dtype=dtype, dim=dim, group=4, length=300, key_mask="random")
    table = tiles(present(torch.device(DEVICE)), dim, dtype)
    fitting = 0
    for tile in table:
        monkeypatch.setattr(triton_attention, "choose_tile", lambda *_, t=tile: t)
        try:
            check(case, DEVICE)
            fitting += 1
        except OutOfResources:  # a smaller relative of the target's device
            continue
    assert fitting


@pytest.mark.parametrize("dtype", [*TOLERANCE, torch.float64], ids=str)
def test_the_op_has_a_kernel_or_the_reference(dtype):
    inputs = [t.to(DEVICE) for t in tensors(6, 2, 150, 150, 64, dtype)]
    actual = attention(*inputs, None, "a-shape", [4], [50], 0)
    mask = visible("a-shape", 4, 50, 150, 150, 0).to(DEVICE)
    narrow = torch.float32 if dtype == torch.float64 else dtype
    assert_close(actual, oracle(*inputs, mask, 64**-0.5), narrow)


def test_opcheck():
    inputs = [t.to(DEVICE).requires_grad_() for t in tensors(4, 2, 33, 33, 16)]
    arguments = (*inputs, None, "a-shape", [2], [9], 0)
    torch.library.opcheck(torch.ops.graphopt.attention.default, arguments)


def text_ids(length: int, batch: int = 1, seed: int = 0) -> torch.Tensor:
    return token_ids(batch, length, seed).to(DEVICE)


@torch.no_grad()
def dense(model, ids, pattern, sink, window):
    """The unmodified model's logits under a mask of the pattern."""
    mask = visible(pattern, sink, window, ids.shape[1], ids.shape[1], 0)
    mask = mask.to(DEVICE).expand(ids.shape[0], 1, -1, -1)
    return model(ids, attention_mask=mask, use_cache=False).logits


@pytest.mark.parametrize("pattern", ["a-shape", "streaming", "sliding-window"])
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_llama_equals_eager_with_the_mask(pattern, dtype):
    model = TINY["llama"]().to(DEVICE, dtype)
    config = f"sparse-attention{{pattern={pattern},sink=64,window=128,force=true}}"
    fast = torch.compile(
        model,
        backend="graphopt",
        dynamic=True,
        options={"config": config, "strict": True},
    )
    for length, batch in itertools.product((500, 1100), (1, 2)):
        ids = text_ids(length, batch)
        expected = dense(model, ids, pattern, 64, 128).double()
        with torch.no_grad():
            actual = fast(ids, use_cache=False).logits
        assert_close(actual, expected, dtype)
        causal = dense(model, ids, "causal", 0, 0).double()
        assert (causal - expected).abs().max() > 10 * TOLERANCE[torch.float32]


def test_the_example_config_rewrites_long_prompts_only():
    model = TINY["llama"]().to(DEVICE)
    expected = [
        dense(model, text_ids(6000), "a-shape", 128, 1024),
        dense(model, text_ids(1500), "causal", 0, 0),
    ]
    graphopt.compile(model, "examples/a-shape.toml", strict=True)
    for logits in expected:
        with torch.no_grad():
            actual = model(text_ids(logits.shape[1]), use_cache=False).logits
        assert_close(actual, logits.double(), torch.float32)


def test_cuda_graphs_replay_tables_of_heads():
    config = (
        "sparse-attention{sink=64,window=100,force=true,"
        'heads=[{heads=[0],pattern="dense"},{heads=[1,2],window=30}]}'
    )
    heads = [(0, 2**31 - 1), (64, 30), (64, 30), (64, 100)]
    masks = [visible("a-shape", *pair, 700, 700, 0) for pair in heads]
    mask = torch.stack(masks)[None].to(DEVICE)
    eager, model = (TINY["llama"]().to(DEVICE) for _ in range(2))
    graphopt.compile(model, config, dynamic=False, mode="reduce-overhead", strict=True)
    for seed in range(4):  # warm up, record, replay, replay
        ids = text_ids(700, seed=seed)
        with torch.no_grad():
            actual = model(ids, use_cache=False).logits.clone()
            expected = eager(ids, attention_mask=mask, use_cache=False).logits
        assert_close(actual, expected.double(), torch.float32)


def test_generate_gives_the_tokens_of_eager():
    model = TINY["llama"]().to(DEVICE)
    ids = text_ids(200)
    settings = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0}
    expected = model.generate(ids, **settings)
    graphopt.compile(model, "sparse-attention{window=4096,force=true}", strict=True)
    assert torch.equal(model.generate(ids, **settings), expected)
