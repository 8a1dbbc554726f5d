"""Combining and sampling in Triton: interpreted, and compiled ahead of time."""

from __future__ import annotations

import ast
import re
from unittest import mock

import pytest
import torch

from graphopt.codegen.targets import TARGETS, Tile
from graphopt.codegen.triton import combine
from graphopt.codegen.triton.ahead import _POINTERS
from graphopt.codegen.triton.interpreter import is_interpreted
from graphopt.codegen.triton.select_ahead import compile_kernel
from graphopt.errors import KernelError
from tests.ops.logits import members, oracle, settings

# (rows, vocabulary, pairs, dtype), (drawn, temperature, top_p, of_base)
CASES = [
    ((2, 100, 1, torch.float32), (False, None, None, False)),
    ((2, 100, 2, torch.bfloat16), (True, 0.7, None, False)),
    ((1, 100, 1, torch.float32), (True, 0.7, 0.6, False)),
    ((1, 70, 1, torch.float16), (False, None, 0.3, True)),
    ((1, 70, 0, torch.float32), (True, 1.5, 1.0, True)),
]


def check(case, device="cpu", block=None):
    sizes, how = case
    given = members(*sizes)
    base, tuned, reference, weights, beta = given
    more = settings(sizes[0], *how)
    rows = [base, *(t for pair in zip(tuned, reference, strict=True) for t in pair)]
    rows = [t.to(device) for t in rows]
    moved = [t.to(device) if isinstance(t, torch.Tensor) else t for t in more]
    with mock.patch.object(combine, "BLOCK", block or combine.BLOCK):
        found = combine.combine_sample(rows, (beta * weights).to(device), *moved)
    assert torch.equal(found.cpu(), oracle(given, *more))


def check_infinities():
    from tests.ops.test_logits import excluding

    for factor, expected in ((0.5, 2), (-0.5, 0)):
        base, (tuned,), (reference,), weights, _ = excluding(factor)
        found = combine.combine_sample([base, tuned, reference], weights)
        assert found.tolist() == [expected]
    empty = torch.full((1, 6), -torch.inf)
    bad = torch.tensor([[1.0, torch.nan, 2.0]])
    for rows in (empty, bad):
        for more in ((), (torch.rand(1),)):
            found = combine.combine_sample([rows], torch.zeros(0), *more)
            assert found.tolist() == [-1]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_tokens_are_those_of_float64(interpreter, case):
    interpreter.submit(check, case, "cpu", 64).result()


def test_infinities(interpreter):
    interpreter.submit(check_infinities).result()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_the_device():
    for sizes in ((16, 128_256, 1), (1, 32_000, 2), (3, 262_144, 1)):
        for case in CASES:
            check(((*sizes, case[0][-1]), case[1]), "cuda")


@pytest.mark.parametrize("pairs", [0, 1, 2])
def test_the_text_stands_alone(pairs):
    source = combine.emit_combine(pairs)
    assert not re.findall(r"^\s*%.*|@[A-Z_]+@", source, re.MULTILINE)
    tree = ast.parse(source)
    imports = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]
    assert {n.names[0].name for n in imports} == {"torch", "triton", "triton.language"}


def compiled(name, target, **constants):
    kernel = getattr(combine.load_combine(1), name)
    logits = ("base_ptr", "tuned_0_ptr", "reference_0_ptr")
    types = dict.fromkeys(kernel.arg_names, "*fp32")
    types |= dict.fromkeys(logits, _POINTERS[torch.bfloat16])
    types |= {n: "i32" for n in types if not n.endswith("_ptr")}
    types |= {"places_ptr": "*i32", "tokens_ptr": "*i64"}
    tile = Tile(1, 1, combine.OPTIONS["num_warps"], combine.OPTIONS["num_stages"])
    constants = {k: v for k, v in constants.items() if k in kernel.arg_names}
    return compile_kernel(kernel, types, constants, TARGETS[target], tile)


@pytest.mark.skipif(is_interpreted(), reason="TRITON_INTERPRET=1 compiles nothing")
@pytest.mark.parametrize(
    ("name", "target"), [("narrow", "sm_90"), ("draw", "gfx942"), ("weigh", "sm_90")]
)
def test_nothing_spills(name, target):
    shifts = combine.load_combine(1).SHIFTS
    sizes = {"BLOCK": combine.BLOCK, "CHUNKS": 128, "OF_BASE": False, "CUT": True}
    found = compiled(name, target, ROUND=7, SHIFTS_=shifts, **sizes)
    assert found.spills == 0
    assert found.shared_memory <= TARGETS[target].shared_memory


def test_this_process_names_the_way_to_interpret():
    if is_interpreted():
        pytest.skip("kernels run here")
    with pytest.raises(KernelError, match="TRITON_INTERPRET=1"):
        combine.combine_sample([torch.randn(1, 4)], torch.zeros(0))
