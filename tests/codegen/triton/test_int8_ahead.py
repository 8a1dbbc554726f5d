"""Int8 linears in Triton: their texts, and compiled ahead of time."""

from __future__ import annotations

import ast
import re
from itertools import product

import pytest
import torch

from graphopt.codegen.targets import TARGETS
from graphopt.codegen.triton import int8, int8_emit
from graphopt.codegen.triton.int8_ahead import compile_int8
from graphopt.codegen.triton.int8_spec import ProductSpec, RowsSpec
from graphopt.codegen.triton.interpreter import is_interpreted
from graphopt.errors import KernelError
from graphopt.ops.int8 import codes as int8_codes
from tests.codegen.triton.int8_cases import BF16, FP16, FP32
from tests.oracle import TOLERANCE

SHADOW, SINGLE = ProductSpec(BF16, True, has_bias=True), ProductSpec(FP32, True)
BOTH = ("sm_90", "gfx942")
BUILT = [
    *((SHADOW, kernel, name) for kernel in ("collect", "product") for name in BOTH),
    *((SHADOW, "mark", BOTH[0]), (SINGLE, "product", BOTH[1])),
    *((RowsSpec(BF16, 1), "sums", name) for name in BOTH),
    *(
        (RowsSpec(FP16, 8, True), "sums", BOTH[0]),
        (RowsSpec(FP32, 16), "sums", BOTH[1]),
    ),
    (RowsSpec(BF16, 1), "merge", BOTH[0]),
]


@pytest.mark.skipif(is_interpreted(), reason="nothing is compiled")
@pytest.mark.parametrize(
    ("spec", "kernel", "name"), BUILT, ids=lambda x: getattr(x, "name", x)
)
def test_nothing_spills(spec, kernel, name):
    is_product = isinstance(spec, ProductSpec)
    target = TARGETS[name]
    tile = (spec.tiles(target, 4096) if is_product else spec.tiles())[0]
    compiled = compile_int8(spec, kernel, target, tile)
    assert compiled.spills == 0
    assert compiled.shared_memory <= target.shared_memory
    assert "atom" not in compiled.assembly
    if kernel == "product":
        found = r"wgmma\S+s32\.s8\.s8" if name == "sm_90" else r"mfma_i32\w+_i8"
        assert re.search(found, compiled.assembly)
    if name == "sm_90" and kernel == "sums":  # sixteen codes at a time
        found = (
            r"ld\.global\.v4\.b32" if spec.dtype == BF16 else r"cp\.async\S+ .* 0x10"
        )
        assert re.search(found, compiled.assembly)


def test_the_texts_stand_alone():
    flags = product((False, True), repeat=2)
    specs = [ProductSpec(d, s, has_bias=b) for (s, b), d in product(flags, TOLERANCE)]
    specs += [ProductSpec(BF16, by_token=True)]
    specs += [RowsSpec(d, r, r > 1) for d, r in product(TOLERANCE, (1, 2, 16))]
    assert len({spec.name for spec in specs}) == len(specs)
    for spec in specs:
        source = int8.source_of(spec)
        assert not re.findall(r"^\s*%.*|@[A-Z_]+@", source, re.MULTILINE)
        assert max(map(len, source.splitlines())) <= 88
        for function in ast.parse(source).body:
            if isinstance(function, ast.FunctionDef):
                names = {n.id for n in ast.walk(function) if isinstance(n, ast.Name)}
                assert {a.arg for a in function.args.args} <= names, function.name


def test_the_kernels_have_the_codes_of_the_operators():
    named = (int8_codes.LEAST, int8_codes.MOST, int8_codes.ZERO)
    assert named == (int8_emit.LEAST, int8_emit.MOST, 128)


def test_what_has_no_kernel_is_refused():
    for spec in (ProductSpec, RowsSpec):
        with pytest.raises(KernelError, match=r"no int8 linear for torch\.float64"):
            spec(torch.float64, 1)
