"""Emitted Triton kernels compiled for every GPU target, with no GPU."""

from __future__ import annotations

import pytest
import torch

from graphopt.codegen.targets import TARGETS, Tile, target, tiles
from graphopt.codegen.triton import ahead
from graphopt.codegen.triton.ahead import compile_ahead
from graphopt.codegen.triton.spec import AttentionSpec
from graphopt.errors import KernelError

GPUS = tuple(name for name, t in TARGETS.items() if t.is_gpu)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
MASK, CAP, HEADS = "has_key_mask", "has_softcap", "per_head"
PACKED = "packed"

# Every pattern, dtype, head dim of a chunk more, and option; not their product, which
# takes a quarter of an hour.
SPECS = (
    ("a-shape", BF16, 64, 3, ()),
    ("a-shape", BF16, 128, 4, (HEADS,)),
    ("a-shape", BF16, 128, 4, (MASK,)),
    ("streaming", FP16, 80, 1, (MASK,)),
    ("sliding-window", BF16, 256, 4, (CAP,)),
    ("causal", FP16, 96, 8, (CAP,)),
    ("full", FP32, 128, 1, (MASK,)),
    ("sliding-window", BF16, 64, 3, (MASK, PACKED)),
)
# The first and the widest for every target, the others for two that alternate.
CASES = [
    (name, spec)
    for place, spec in enumerate(SPECS)
    for name in (GPUS if place == 0 or spec[2] == 256 else GPUS[place % 2 :: 2])
]


def build(pattern, dtype, dim, group, flags) -> AttentionSpec:
    return AttentionSpec(pattern, dtype, dim, dim, group, **dict.fromkeys(flags, True))


@pytest.fixture(autouse=True)
def _compiler():
    if ahead.is_interpreted():
        pytest.skip("TRITON_INTERPRET=1 leaves nothing to compile")


@pytest.mark.parametrize(("name", "given"), CASES, ids=str)
def test_nothing_spills_and_shared_memory_fits(name, given):
    spec = build(*given)
    compiled = compile_ahead(spec, target(name))
    assert compiled.spills == 0
    assert 0 < compiled.shared_memory <= target(name).shared_memory
    assert 0 < compiled.registers <= (512 if name == "gfx942" else 255)
    # Full fp32 products have no tensor-core instruction.
    assert compiled.has_wgmma == (name == "sm_90" and spec.dtype != FP32)


@pytest.mark.parametrize("name", GPUS)
def test_short_queries(name):
    spec = build("a-shape", FP32, 256, 4, (MASK, CAP, HEADS))
    tile = tiles(target(name), 256, FP32, query_len=1)[0]
    compiled = compile_ahead(spec, target(name), tile)
    assert tile.block_m == 16
    assert compiled.spills == 0


@pytest.mark.parametrize(("name", "most"), [("sm_90", 4), ("sm_100", 8)])
def test_a_thread_reads_few_bytes_of_a_key_mask(name, most):
    """Not one byte for every score that it holds."""
    text = compile_ahead(build(*SPECS[2]), target(name)).assembly
    assert 1 <= text.count("ld.global.b8") <= most


def test_spills_are_seen():
    crowded = Tile(64, 64, 4, 1)
    spec = build("causal", BF16, 256, 1, ())
    assert compile_ahead(spec, target("sm_80"), crowded).spills > 100


def test_a_cpu_is_no_target():
    with pytest.raises(KernelError, match="x86-64 is no Triton target"):
        compile_ahead(
            build(*SPECS[0]), target("x86-64"), tiles(target("sm_80"), 64, BF16)[0]
        )


def test_the_interpreter_is_refused(monkeypatch):
    monkeypatch.setattr(ahead, "is_interpreted", lambda: True)
    with pytest.raises(KernelError, match="unset it to compile"):
        compile_ahead.__wrapped__(build(*SPECS[0]), target("sm_80"))
