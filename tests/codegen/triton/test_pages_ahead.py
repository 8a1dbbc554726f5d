"""Emitted Triton kernels on pages: their text, and compiled for every GPU target."""

from __future__ import annotations

import ast
import itertools
import re

import pytest
import torch

from graphopt.codegen.targets import TARGETS
from graphopt.codegen.triton.interpreter import is_interpreted
from graphopt.codegen.triton.pages_ahead import (
    KERNELS,
    compile_append,
    compile_page_attention,
)
from graphopt.codegen.triton.pages_emit import emit_append, emit_page_attention
from graphopt.codegen.triton.pages_spec import AppendSpec, PageAttentionSpec
from graphopt.codegen.triton.spec import DTYPES
from tests.codegen.triton.pairwise import name_of as pair_name
from tests.codegen.triton.pairwise import on_two

GPUS = tuple(name for name, t in TARGETS.items() if t.is_gpu)
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
COMMON = list(
    itertools.product(
        DTYPES, ((64, 64), (80, 40), (128, 128)), ("", "int8", "int4"), (False, True)
    )
)
FLAGS = list(itertools.product((False, True), repeat=2))
APPENDS = [
    AppendSpec(dtype, *dims, *rest, judged)
    for dtype, dims, *rest in COMMON
    for judged in (False, True)
]
ATTENTIONS = [
    PageAttentionSpec(dtype, *dims, *rest, 4, *flags)
    for (dtype, dims, *rest), flags in itertools.product(COMMON, FLAGS)
]
SOURCES = {spec.name: emit_append(spec) for spec in APPENDS}
SOURCES |= {spec.name: emit_page_attention(spec) for spec in ATTENTIONS}

BUILT_APPENDS = (
    AppendSpec(BF16, 128, 128, "", False, True),
    AppendSpec(BF16, 128, 128, "int8", True),
    AppendSpec(FP16, 80, 80, "int4", False, True),
    AppendSpec(FP32, 256, 256, "int4", False, True),
    AppendSpec(BF16, 128, 128, "", False, True, extremes=False),
    AppendSpec(FP16, 80, 80, "int4", False, True, extremes=False),
)
# Every dtype, kind, width of a head, and option.
BUILT = (
    PageAttentionSpec(BF16, 128, 128, "", False, 4),
    PageAttentionSpec(BF16, 128, 128, "", True, 8, True),
    PageAttentionSpec(BF16, 128, 128, "int8", True, 4, False, True),
    PageAttentionSpec(FP16, 80, 80, "int4", False, 1, True),
    PageAttentionSpec(FP16, 256, 256, "int4", True, 4, True, True),
    PageAttentionSpec(BF16, 256, 256, "", False, 32),
    PageAttentionSpec(FP32, 64, 64, "int8", True, 3, True),
    PageAttentionSpec(FP32, 256, 256, "", False, 4, True),
)
# The first two and half floats of the widest head for every target, the others for two.
BUILT_FOR = [
    (spec, name)
    for place, spec in enumerate(BUILT)
    for name in (GPUS if place in (0, 1, 4, 5) else GPUS[place % 2 :: 2])
]


def test_different_specs_have_different_names():
    assert len(SOURCES) == len(APPENDS) + len(ATTENTIONS)


@pytest.mark.parametrize("name", SOURCES)
def test_the_text_stands_alone(name):
    source = SOURCES[name]
    assert not re.findall(r"^\s*%.*|@[A-Z_]+@", source, re.MULTILINE)
    assert max(map(len, source.splitlines())) <= 88
    tree = ast.parse(source)
    imports = [n for n in ast.walk(tree) if isinstance(n, ast.Import | ast.ImportFrom)]
    assert {n.names[0].name for n in imports} == {"torch", "triton", "triton.language"}
    known = {"torch", "triton", "tl", "float", "int", "range", "min", "max"}
    known |= {n.name for n in tree.body if isinstance(n, ast.FunctionDef)}
    known |= {n.targets[0].id for n in tree.body if isinstance(n, ast.Assign)}
    for function in (n for n in tree.body if isinstance(n, ast.FunctionDef)):
        names = [n for n in ast.walk(function) if isinstance(n, ast.Name)]
        stored = {n.id for n in names if isinstance(n.ctx, ast.Store)}
        loaded = {n.id for n in names if isinstance(n.ctx, ast.Load)}
        given = function.args
        parameters = {a.arg for a in [*given.args, *filter(None, [given.kwarg])]}
        assert loaded <= stored | parameters | known, function.name
        assert parameters <= loaded, function.name


def fits(compiled, name):
    assert compiled.spills == 0
    assert compiled.shared_memory <= TARGETS[name].shared_memory
    assert 0 < compiled.registers <= (512 if name == "gfx942" else 255)


@pytest.fixture
def _compiler():
    if is_interpreted():
        pytest.skip("TRITON_INTERPRET=1 leaves nothing to compile")


@pytest.mark.usefixtures("_compiler")
@pytest.mark.parametrize(
    ("spec", "name"),
    on_two(BUILT_APPENDS, GPUS),
    ids=pair_name,
)
def test_appending_spills_nothing(spec, name):
    fits(compile_append(spec, TARGETS[name]), name)


@pytest.mark.usefixtures("_compiler")
@pytest.mark.parametrize(
    ("spec", "name"), BUILT_FOR, ids=lambda one: getattr(one, "name", one)
)
def test_attention_spills_nothing(spec, name):
    # The others hang on little of a spec.
    for kernel in KERNELS if spec in BUILT[:2] else ("score", "attend"):
        fits(compile_page_attention(spec, kernel, TARGETS[name]), name)


@pytest.mark.usefixtures("_compiler")
def test_pages_and_statistics_are_read_sixteen_bytes_at_a_time():
    target = TARGETS["sm_90"]
    attend = compile_page_attention(BUILT[1], "attend", target).assembly
    assert len(re.findall(r"cp\.async\.cg\.shared\.global", attend)) >= 32
    assert not re.findall(r"cp\.async\.ca|ld\.global\.b16", attend)
    score = compile_page_attention(BUILT[0], "score", target).assembly
    assert len(re.findall(r"ld\.global\.v4\.b32", score)) == 8
    assert score.count("ld.global.b16") <= 4 * BUILT[0].group


@pytest.mark.usefixtures("_compiler")
def test_codes_are_divided_and_added_as_the_reference_does():
    text = compile_append(BUILT_APPENDS[2], TARGETS["sm_90"]).assembly
    assert "div.rn.f32" in text
    assert not re.findall(r"div\.(full|approx)|fma\.rn\.f32", text)
