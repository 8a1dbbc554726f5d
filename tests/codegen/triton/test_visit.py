"""The Triton kernel over visit lists: interpreted, and compiled ahead of time."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch

from graphopt.codegen.targets import TARGETS
from graphopt.codegen.triton import visit
from graphopt.codegen.triton.ahead import compile_ahead
from graphopt.codegen.triton.spec import VISIT_LIST, AttentionSpec
from tests.ops.block_lists import random_blocks
from tests.ops.test_visit import lists_of, random_places
from tests.oracle import assert_close, oracle, tensors


@dataclass(frozen=True)
class Case:
    """A call; every head has columns and slashes of its own."""

    queries: int
    keys: int
    dim: int = 64
    group: int = 1
    kv_heads: int = 1
    dtype: torch.dtype = torch.float32
    softcap: float = 0.0
    masked: bool = False
    dense_rows: tuple[int, ...] = (0,)
    has_list: tuple[int, ...] = ()
    block: int = 64

    def __str__(self):
        return f"{self.queries}x{self.keys} d{self.dim} g{self.group} {self.dtype}"


CASES = [
    Case(1, 300, group=4),
    Case(17, 17, dim=72, masked=True),
    Case(63, 64, dim=80, dtype=torch.float16, softcap=5.0),
    Case(65, 65, dim=96, group=3, dtype=torch.bfloat16),
    Case(70, 70, dim=256, group=1, kv_heads=2, dense_rows=(3,)),
    Case(130, 200, dim=128, group=3, dtype=torch.bfloat16, masked=True),
    Case(200, 200, group=2, kv_heads=2, dense_rows=(0, 100, 5, 200)),
    Case(400, 400, dtype=torch.float16),
    Case(1, 300, group=2, has_list=(1, 0)),
    Case(65, 200, dim=72, group=2, has_list=(0, 1), masked=True),
    Case(200, 200, group=2, kv_heads=2, has_list=(1, 0, 1, 1), block=128, masked=True),
    Case(300, 300, group=3, has_list=(1,) * 3, dense_rows=(0, 3, 300), block=128),
    Case(200, 330, dim=128, dtype=torch.bfloat16, has_list=(1,), softcap=5.0),
    Case(150, 150, group=2, dtype=torch.float16, has_list=(1, 1), block=128),
]


def check(case, device="cpu"):
    heads = case.group * case.kv_heads
    sizes = (heads, case.kv_heads, case.queries, case.keys, case.dim)
    q, k, v = (t.to(device) for t in tensors(*sizes, case.dtype, batch=2))
    columns = [random_places(min(case.keys, 9 * h), case.keys, h) for h in range(heads)]
    slashes = [random_places(min(case.keys, 1 + h), case.keys, h) for h in range(heads)]
    lists = lists_of(columns, slashes, case.keys, batch=2)
    lists = type(lists)(*(t.to(device) for t in lists))
    offset, rows = case.keys - case.queries, list(case.dense_rows)
    blocks = None
    if case.has_list:
        sizes = (case.queries, case.keys, offset, case.has_list, case.block)
        blocks = random_blocks(*sizes, batch=2)
        blocks = blocks._replace(
            key_blocks=blocks.key_blocks.to(device),
            key_block_count=blocks.key_block_count.to(device),
        )
    mask = lists.visited(rows, case.queries, case.keys, offset, blocks)
    key_mask = (torch.rand(2, case.keys) < 0.7).to(device) if case.masked else None
    if key_mask is not None:
        mask = mask & key_mask[:, None, None]
    rest = (offset, case.dim**-0.5, case.softcap)
    actual = visit.launch(q, k, v, key_mask, lists, rows, *rest, blocks)
    expected = oracle(q, k, v, mask, case.dim**-0.5, case.softcap)
    assert_close(actual, expected, case.dtype)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_in_the_interpreter(interpreter, case):
    interpreter.submit(check, case).result()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("case", CASES, ids=str)
def test_on_the_device(case):
    check(case, "cuda")


@pytest.mark.parametrize(
    ("target", "dim", "dtype", "block"),
    [
        ("sm_80", 64, torch.float16, 0),
        ("sm_80", 64, torch.float16, 128),
        ("sm_90", 128, torch.bfloat16, 64),
        ("sm_90", 128, torch.bfloat16, 128),
        ("sm_90", 64, torch.float32, 0),
        ("sm_90", 64, torch.float32, 64),
        ("sm_100", 256, torch.bfloat16, 128),
        ("gfx942", 128, torch.float16, 0),
        ("gfx942", 128, torch.float16, 128),
    ],
)
def test_compiles_without_spills(target, dim, dtype, block):
    flags = {"has_key_mask": dim == 64, "block": block}
    spec = AttentionSpec(VISIT_LIST, dtype, dim, dim, 4, **flags)
    compiled = compile_ahead(spec, TARGETS[target])
    assert compiled.spills == 0
    assert compiled.shared_memory <= TARGETS[target].shared_memory
    if target == "sm_90" and dtype != torch.float32:
        assert compiled.has_wgmma
