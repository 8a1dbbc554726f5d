"""Triton kernels of ragged batches on pages: interpreted, compiled, on a device."""

from __future__ import annotations

import ast
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import pytest
import torch

from graphopt.codegen.predicates import PATTERNS
from graphopt.codegen.targets import TARGETS, Tile
from graphopt.codegen.triton import ragged, ragged_append
from graphopt.codegen.triton.interpreter import is_interpreted
from graphopt.codegen.triton.pages_emit import emit_append_ragged
from graphopt.codegen.triton.pages_spec import AppendSpec
from graphopt.codegen.triton.ragged_ahead import compile_ragged
from graphopt.codegen.triton.ragged_emit import emit_ragged
from graphopt.codegen.triton.ragged_spec import RaggedSpec
from graphopt.errors import KernelError
from graphopt.ops.pages import append_ragged_reference
from tests.codegen.triton.pages_cases import assert_equal
from tests.codegen.triton.pairwise import pairwise
from tests.ops.pages import CODES
from tests.ops.ragged_pages import Ragged
from tests.oracle import TOLERANCE, assert_close

BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
GPUS = tuple(name for name, t in TARGETS.items() if t.is_gpu)
on_a_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")

ROWS = {
    "mixed": ((5, 0, 1, 40), (0, 3, 200, 70)),
    "decodes": ((1, 1, 1), (0, 64, 700)),
    "long decode": ((30, 1), (100, 1000)),
    "no rows": ((), ()),
}


@dataclass(frozen=True)
class Case:
    """One call of each kernel; sinks and windows differ ``per_head``."""

    rows: str = "mixed"
    pattern: str = "causal"
    dtype: torch.dtype = FP32
    kind: str = ""
    dims: tuple[int, int] = (32, 16)
    heads: tuple[int, int] = (4, 2)
    softcap: float = 0.0
    per_head: str = "none"
    padding: int = 3
    turned: bool = False

    def __str__(self) -> str:
        given = {n: v for n, v in vars(self).items() if v != getattr(Case(), n)}
        return " ".join(f"{n}={v}" for n, v in given.items()).replace("torch.", "")

    @property
    def batch(self) -> Ragged:
        (heads, kv_heads), (dim, value_dim) = self.heads, self.dims
        own = {"dtype": self.dtype, "kind": self.kind, "padding": self.padding}
        sizes = {"heads": heads, "kv_heads": kv_heads}
        return Ragged(*ROWS[self.rows], dim=dim, value_dim=value_dim, **sizes, **own)

    @property
    def tables(self) -> tuple[list[int], list[int]]:
        heads, kv_heads = self.heads
        if self.per_head == "none":
            return [64], [128]
        group = heads // kv_heads if self.per_head == "groups" else 1
        some = [h // group % 3 for h in range(heads)]
        return [64 * n for n in some], [64 * (n + 1) for n in some]


FACTORS: dict[str, Sequence[Any]] = {
    "rows": tuple(ROWS)[:3],
    "pattern": PATTERNS,
    "dtype": tuple(TOLERANCE),
    "kind": tuple(CODES),
    "dims": ((32, 16), (80, 40)),
    "heads": ((4, 2), (2, 2), (6, 2)),
    "softcap": (0.0, 5.0),
    "per_head": ("none", "groups", "each"),
    "padding": (0, 3),
    "turned": (False, True),
}
SINGLE = [Case("no rows"), Case("long decode", heads=(17, 1))]
CASES = [*SINGLE, *(Case(**c) for c in pairwise(FACTORS))]


def moved(device: str, *tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    return [t if t is None else t.to(device) for t in tensors]


def laid_out(case: Case, x: torch.Tensor) -> torch.Tensor:
    return x.transpose(1, 2).contiguous().transpose(1, 2) if case.turned else x


def check(case: Case, device: str = "cpu") -> None:
    """Append as the reference does, and attend as the oracle does."""
    batch = case.batch
    where = moved(device, batch.starts, batch.before, batch.table)
    ours, theirs = moved(device, *batch.held_before()), batch.held_before()
    new = [laid_out(case, x) for x in batch.new()]
    ragged_append.launch(*moved(device, *new), *where, *ours)
    append_ragged_reference(*new, batch.starts, batch.before, batch.table, *theirs)
    for mine, other in zip(ours, theirs, strict=True):
        if mine is not None:
            assert_equal(mine.cpu(), other)
    query = laid_out(case, batch.query())
    rest = (case.pattern, *case.tables)
    scale = batch.dim**-0.5
    out = ragged.launch(
        query.to(device), *where, *ours, *rest, scale, case.softcap
    ).cpu()
    assert out.is_contiguous()
    expected = batch.expected(query, theirs, *rest, scale, case.softcap)
    assert_close(out, expected, case.dtype)
    assert not out[:, :, sum(batch.lengths) :].any()


@pytest.mark.parametrize("case", CASES, ids=str)
def test_in_the_interpreter(interpreter, case):
    interpreter.submit(check, case).result()


@pytest.mark.gpu
@on_a_gpu
@pytest.mark.parametrize("case", CASES, ids=str)
def test_on_the_device(case):
    check(case, "cuda")


def check_splits() -> None:
    """The result does not hang on how keys are split; one decode takes all splits."""
    batch = Case("long decode", dtype=FP16, dims=(16, 16)).batch
    pools = batch.held_before()
    append_ragged_reference(
        *batch.new(), batch.starts, batch.before, batch.table, *pools
    )
    where = (batch.starts, batch.before, batch.table)
    rest = ("causal", [0], [0], 0.25, 0.0)
    expected = batch.expected(batch.query(), pools, *rest[:3], 0.25)
    for programs, most in ((1, (1, 1)), (16, (4, 2)), (1000, (4, 4))):
        with mock.patch.object(ragged, "_PROGRAMS", programs):
            spec = ragged.ragged_spec(batch.query(), pools[:2], "causal", [], 0.0)
            tile = ragged.ragged_tile(spec, batch.tokens, 2)
            shapes = (batch.query().shape, batch.table.shape)
            assert ragged.splits(spec, tile, *shapes) == most
            out = ragged.launch(batch.query(), *where, *pools, *rest)
        assert_close(out, expected, FP16)


def test_any_number_of_splits_gives_the_same(interpreter):
    interpreter.submit(check_splits).result()


@pytest.mark.gpu
@on_a_gpu
def test_a_cuda_graph_of_a_step_is_replayed_for_other_rows():
    append = torch.ops.graphopt.append_ragged
    attend = torch.ops.graphopt.ragged_page_attention
    rows = [((5, 1, 30), (0, 900, 10)), ((1, 34, 0), (700, 3, 800))]
    first, second = (Ragged(*row, padding=36 - sum(row[0]), seed=7) for row in rows)

    def inputs(batch):
        where = (batch.starts, batch.before, first.table)
        return moved("cuda", batch.query(), *batch.new(), *where)

    pools = moved("cuda", *first.held_before())
    static = inputs(first)

    def step(query, key, value, *where):
        append(key, value, *where, *pools)
        return attend(query, *where, *pools, "causal", [0], [0])

    step(*static)  # compiles, outside of the capture
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = step(*static)
    for batch in (second, first):
        for held, new in zip(static, inputs(batch), strict=True):
            held.copy_(new)
        pools[0].normal_()
        pools[1].normal_()
        graph.replay()
        assert torch.equal(out, step(*inputs(batch)))


def check_refusals() -> None:
    batch = Case().batch
    pools, query = batch.held_before(), batch.query()
    turned = batch.table.t().contiguous().t()
    rest = ("causal", [0], [0], 1.0, 0.0)
    with pytest.raises(KernelError, match="the kernels take contiguous ones"):
        ragged.launch(query, batch.starts, batch.before, turned, *pools, *rest)
    where = (batch.starts, batch.before, batch.table)
    with pytest.raises(KernelError, match=r"no Triton pages for torch\.float64"):
        ragged.launch(query.double(), *where, *pools, *rest)


def test_what_has_no_kernel_is_refused(interpreter):
    interpreter.submit(check_refusals).result()


# Every dtype, kind, pattern, width of a head, option and target; not their product.
MIXED, DECODES = (512, 8), (8, 8)
PLAIN = RaggedSpec(BF16, 128, 128, "", False, "causal", 4, 4)
INT8 = RaggedSpec(BF16, 128, 128, "int8", False, "a-shape", 8, 8, True, True)
INT4 = RaggedSpec(FP16, 80, 80, "int4", False, "streaming", 4, 1, True, True)
WIDE = RaggedSpec(BF16, 256, 256, "", False, "sliding-window", 96, 96)
SINGLE_FLOATS = RaggedSpec(FP32, 128, 128, "int8", False, "full", 3, 3)
BUILT = (
    *((PLAIN, MIXED, name) for name in GPUS),
    (PLAIN, DECODES, "sm_80"),
    (PLAIN, DECODES, "gfx942"),
    (INT8, MIXED, "sm_80"),
    (INT8, DECODES, "sm_90"),
    (INT4, MIXED, "sm_90"),
    (INT4, DECODES, "sm_100"),
    (WIDE, MIXED, "gfx942"),
    (SINGLE_FLOATS, MIXED, "sm_80"),
)


@pytest.mark.skipif(is_interpreted(), reason="nothing is compiled")
@pytest.mark.parametrize(
    ("spec", "shape", "name"), BUILT, ids=lambda x: getattr(x, "name", None)
)
def test_nothing_spills(spec, shape, name):
    for kernel in ("attend", "merge") if spec == PLAIN else ("attend",):
        compiled = compile_ragged(spec, kernel, TARGETS[name], *shape)
        assert compiled.spills == 0
        assert compiled.shared_memory <= TARGETS[name].shared_memory
        if kernel == "attend" and name == "sm_90":
            assert compiled.has_wgmma == (shape == MIXED)


def test_the_texts_stand_alone():
    specs = [PLAIN, INT8, INT4, WIDE, SINGLE_FLOATS]
    sources = [emit_ragged(spec) for spec in specs]
    sources += [emit_append_ragged(AppendSpec(BF16, 80, 64, kind)) for kind in CODES]
    assert len({spec.name for spec in specs}) == len(specs)
    for source in sources:
        assert not re.findall(r"^\s*%.*|@[A-Z_]+@", source, re.MULTILINE)
        tree = ast.parse(source)
        for function in (n for n in tree.body if isinstance(n, ast.FunctionDef)):
            names = {n.id for n in ast.walk(function) if isinstance(n, ast.Name)}
            given = {a.arg for a in function.args.args}
            assert function.name == "visible" or given <= names, function.name


@pytest.mark.parametrize("tokens", [1, 8, 64, 300, 4000])
@pytest.mark.parametrize("rows", [1, 8, 200])
def test_scratch_memory_is_bounded(tokens, rows):
    spec = RaggedSpec(BF16, 128, 128, "", False, "causal", 4, 4)
    tile = ragged.ragged_tile(spec, tokens, rows)
    assert isinstance(tile, Tile)
    of_rows, of_tiles = ragged.splits(spec, tile, (1, 32, tokens, 128), (rows, 2000))
    assert of_rows >= of_tiles >= 1
    tiles = tokens // (tile.block_m // 4) + rows + 1
    assert of_rows * rows * 8 <= max(512, rows * 8)
    assert of_tiles * tiles * 8 <= max(512, tiles * 8)
