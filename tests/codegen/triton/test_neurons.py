"""Counting and gathering neurons in Triton: interpreted, and compiled ahead of time."""

from __future__ import annotations

import ast
import re
from unittest import mock

import pytest
import torch

from graphopt.codegen.targets import TARGETS, Tile
from graphopt.codegen.triton import neurons
from graphopt.codegen.triton.ahead import _POINTERS
from graphopt.codegen.triton.interpreter import is_interpreted
from graphopt.codegen.triton.select_ahead import compile_kernel
from graphopt.errors import KernelError
from graphopt.ops.neurons import PARTS, count_reference, gather_reference
from tests.models import padding_mask
from tests.ops.neurons import activations

GPUS = ("sm_90", "gfx942")
# rows, tokens, neurons, dtype, values of few kinds, by size, share
CASES = [
    (1, 4, 70, torch.float32, False, False, 2000),
    (2, 4, 40, torch.bfloat16, True, True, 2000),
    (2, 3, 300, torch.float16, True, False, PARTS),
]
GATHERS = [((40, 150), 0), ((20, 80), 1), ((40,), 0)]


def check_count(case, device="cpu", block=None):
    with mock.patch.object(neurons, "BLOCK", block or neurons.BLOCK):
        _check_count(case, device)


def _check_count(case, device):
    rows, tokens, width, dtype, coarse, absolute, parts = case
    inner = activations(rows, tokens, width, dtype, coarse).to(device)
    mask = padding_mask([tokens - 2 * i for i in range(rows)], tokens).bool().to(device)
    for real in (None, mask):
        found = torch.ones(rows, width, dtype=torch.int32, device=device)
        expected = found.clone()
        neurons.count(inner, real, found, parts, absolute, 3)
        count_reference(inner, real, expected, parts, absolute, 3)
        assert torch.equal(found, expected)


def check_gather(shape, dim, device="cpu"):
    weight = torch.randn(shape).to(device)
    total = shape[dim]
    places = [torch.randperm(total)[:24].sort().values for _ in range(2)]
    places = torch.stack(places).to(device)
    sizes = [2, *shape]
    sizes[dim + 1] = 24
    found, expected = (torch.empty(sizes, device=device) for _ in range(2))
    neurons.gather(weight, places, found, dim)
    gather_reference(weight, places, expected, dim)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_counts_are_the_reference(interpreter, case):
    interpreter.submit(check_count, case, "cpu", 256).result()


@pytest.mark.parametrize(("shape", "dim"), GATHERS)
def test_gathers_are_the_reference(interpreter, shape, dim):
    interpreter.submit(check_gather, shape, dim).result()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_the_device():
    for case in (*CASES, (1, 2000, 14336, torch.bfloat16, True, False, 2000)):
        check_count(case, "cuda")
    for shape, dim in (*GATHERS, ((4096, 14336), 1), ((14336, 4096), 0)):
        check_gather(shape, dim, "cuda")


def test_the_text_stands_alone():
    source = neurons.emit_neurons()
    assert not re.findall(r"^\s*%.*|@[A-Z_]+@", source, re.MULTILINE)
    assert max(map(len, source.splitlines())) <= 88
    tree = ast.parse(source)
    imports = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]
    assert {n.names[0].name for n in imports} == {"torch", "triton", "triton.language"}


def compiled(name, dtype, target, **constants):
    types = dict.fromkeys(("inner_ptr", "weight_ptr", "buffer_ptr"), _POINTERS[dtype])
    types |= {"mask_ptr": "*u8", "counts_ptr": "*i32", "places_ptr": "*i64"}
    options = neurons.COUNT_OPTIONS if name == "count" else neurons.GATHER_OPTIONS
    tile = Tile(1, 1, options["num_warps"], options["num_stages"])
    kernel = getattr(neurons.load_neurons(), name)
    return compile_kernel(kernel, types, constants, TARGETS[target], tile)


@pytest.mark.skipif(is_interpreted(), reason="TRITON_INTERPRET=1 compiles nothing")
@pytest.mark.parametrize("target", GPUS)
def test_nothing_spills(target):
    bits = neurons.load_neurons().BITS[torch.bfloat16]
    sizes = dict(zip(("INFINITY", "SIZE", "STEPS"), bits, strict=True))
    sizes |= {"HAS_MASK": True, "BLOCK": neurons.BLOCK}
    found = [compiled("count", torch.bfloat16, target, **sizes)]
    for columns, blocks in ((False, (8, 128)), (True, (128, 8))):
        tile = dict(zip(("BLOCK_KEPT", "BLOCK_WIDTH"), blocks, strict=True))
        found.append(
            compiled("gather", torch.bfloat16, target, COLUMNS=columns, **tile)
        )
    for one in found:
        assert one.spills == 0
        assert one.shared_memory <= TARGETS[target].shared_memory


def test_this_process_names_the_way_to_interpret():
    if is_interpreted():
        pytest.skip("kernels run here")
    with pytest.raises(KernelError, match="TRITON_INTERPRET=1"):
        neurons.count(torch.ones(1, 1, 4), None, torch.zeros(1, 4).int(), 2000)
