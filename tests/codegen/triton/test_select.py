"""The Triton kernels of vertical-slash selection: interpreted, and compiled ahead."""

from __future__ import annotations

import ast
import itertools
import re

import pytest
import torch

from graphopt.codegen.predicates import BLOCK
from graphopt.codegen.targets import TARGETS
from graphopt.codegen.triton import select
from graphopt.codegen.triton.select_ahead import compile_choice, compile_estimate
from graphopt.codegen.triton.select_emit import emit_choice, emit_estimate
from graphopt.codegen.triton.select_spec import ROWS, EstimateSpec
from graphopt.codegen.triton.spec import DTYPES
from graphopt.errors import KernelError
from graphopt.ops.estimate import LAST_QUERIES
from tests.codegen.triton.pairwise import name_of as pair_name
from tests.codegen.triton.pairwise import on_two
from tests.codegen.triton.select_cases import Case, cases, check, inputs
from tests.oracle import tensors

GPUS = [target for target in TARGETS.values() if target.is_gpu]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32


@pytest.mark.parametrize("case", cases(), ids=str)
def test_lists_are_the_reference(interpreter, case):
    interpreter.submit(check, case).result()


def test_few_heads_are_left_out(interpreter):
    """Else the comparison above would compare nothing."""
    given = [case for case in cases() if case.keys < 200][:6]
    compared = sum(interpreter.submit(check, case).result() for case in given)
    assert compared > 0.7 * sum(2 * case.batch * case.heads for case in given)


def keep_by_hand(mass, first, count):
    """The first places and the heaviest others, of equal ones the lower, ascending."""
    rest = [i for i in range(min(first, len(mass)), len(mass)) if mass[i] > 0]
    best = sorted(rest, key=lambda i: (-mass[i], i))[:count]
    return sorted([*range(min(first, len(mass))), *best])


def runs_by_hand(distances):
    runs = []
    for d in distances:
        if runs and runs[-1][1] >= d - BLOCK + 1:
            runs[-1][1] = d + 1
        else:
            runs.append([d - BLOCK + 1, d + 1])
    return runs


def check_choice(length, last, tables, levels, seed, device="cpu"):
    """Masses of a few values, so that most are equal, in lists of two batch rows."""
    torch.manual_seed(seed)
    heads = len(tables[0])
    sums = torch.rand(2, 2 * heads, length).mul(levels).floor() * 1e-3
    for batch in range(2):
        sums[:, batch * heads : (batch + 1) * heads, last[batch] + 1 :] = float("nan")
    runs = torch.full((2, heads, max(tables[3]) + 1, 2), -7, dtype=torch.int32)
    width = max(max(tables[0]) + max(tables[2]), 1)
    columns = torch.full((2, heads, width), -7, dtype=torch.int32)
    counts = [torch.full((2, heads), -7, dtype=torch.int32) for _ in range(2)]
    lists = [t.to(device) for t in (runs, counts[0], columns, counts[1])]
    given = (torch.tensor(t, dtype=torch.int32).to(device) for t in (last, tables))
    select.load_choice(True).launch(sums.to(device), *given, *lists, num_warps=8)
    runs, run_count, columns, column_count = (t.tolist() for t in lists)
    for batch, head in itertools.product(range(2), range(heads)):
        own = sums[:, batch * heads + head].nan_to_num(0.0).tolist()
        kept = keep_by_hand(own[0], tables[0][head], tables[2][head])
        assert column_count[batch][head] == len(kept)
        assert columns[batch][head] == kept + [0] * (width - len(kept))
        kept = runs_by_hand(keep_by_hand(own[1], tables[1][head], tables[3][head]))
        assert run_count[batch][head] == len(kept)
        rest = len(runs[batch][head]) - len(kept)
        assert runs[batch][head] == kept + [[0, 0]] * rest


CHOICES = [
    (1, [0, 0], [[0, 1], [1, 0], [0, 3], [2, 1]], 3, 0),
    (700, [699, 40], [[4, 0, 900], [5, 0, 0], [30, 7, 0], [3, 9, 0]], 4, 1),
    (5000, [4999, 4500], [[0, 0], [0, 70], [300, 4999], [6, 20]], 1000, 2),
    (9000, [8999, 8000], [[100, 5], [64, 1], [4, 40], [2, 31]], 2000, 3),
]


@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: f"n={choice[0]}")
def test_equal_masses_go_to_the_lower_place(interpreter, choice):
    interpreter.submit(check_choice, *choice).result()


def specs():
    flags = list(itertools.product((False, True), repeat=2))
    for dtype, dim, own in itertools.product(DTYPES, (8, 64, 72, 96, 256), flags):
        yield EstimateSpec(dtype, dim, 4, *own)


def test_the_text_stands_alone():
    sources = [*map(emit_estimate, specs()), *map(emit_choice, (False, True))]
    for source in sources:
        assert not re.findall(r"^\s*%.*|@[A-Z_]+@|[{}]", source, re.MULTILINE)
        assert max(map(len, source.splitlines())) <= 88
        modules = {
            name.name
            for node in ast.walk(ast.parse(source))
            if isinstance(node, ast.Import)
            for name in node.names
        }
        assert modules == {"torch", "triton", "triton.language"}
        assert "graphopt." not in source
    assert len(set(sources)) == len(sources)
    assert len({spec.name for spec in specs()}) == len(list(specs()))


def test_the_rows_are_those_of_the_reference():
    assert ROWS == LAST_QUERIES


def test_what_has_no_kernel_is_refused():
    with pytest.raises(KernelError, match=r"float64; it takes .*bfloat16"):
        EstimateSpec(torch.float64, 64, 1)
    q, k, _ = tensors(1, 1, 8, 8, 64)
    with pytest.raises(KernelError, match="TRITON_INTERPRET=1"):
        select.launch(q, k, None, ([0], [1], [2], [2]), (3, 2), 0, 1.0, 0.0)


ESTIMATES = [
    (BF16, 64, (False, False)),
    (BF16, 128, (True, True)),
    (FP16, 256, (False, True)),
    (FP32, 128, (True, False)),
]


@pytest.mark.parametrize("kernel", ["statistics", "masses"])
@pytest.mark.parametrize(("estimate", "target"), on_two(ESTIMATES, GPUS), ids=pair_name)
def test_passes_compile_without_spills(estimate, target, kernel):
    dtype, dim, flags = estimate
    compiled = compile_estimate(EstimateSpec(dtype, dim, 4, *flags), target, kernel)
    assert compiled.spills == 0
    assert 0 < compiled.shared_memory <= target.shared_memory
    assert compiled.has_wgmma == (target.name == "sm_90" and dtype != FP32)


@pytest.mark.parametrize("target", GPUS, ids=lambda target: target.name)
def test_the_rest_compiles_without_spills(target):
    spec = EstimateSpec(BF16, 64, 1, True)
    compiled = [compile_estimate(spec, target, n) for n in ("combine", "last_real")]
    compiled += [compile_choice(masked, target) for masked in (False, True)]
    assert all(one.spills == 0 for one in compiled)
    assert all(one.shared_memory <= target.shared_memory for one in compiled)
    # Nothing hangs on the order in which programs finish.
    assert not any("atom.global" in one.assembly for one in compiled)


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("case", cases(), ids=str)
def test_on_the_device(case):
    check(case, "cuda")


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("choice", CHOICES, ids=lambda choice: f"n={choice[0]}")
def test_choices_on_the_device(choice):
    check_choice(*choice, device="cuda")


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("key_mask", ["none", "holes"])
def test_a_cuda_graph_replays_the_operator(key_mask):
    case = Case(BF16, group=4, queries=3000, key_mask=key_mask)
    q, k, mask = inputs(case, "cuda")
    arguments = (q, k, mask, [4], [64], [50], [20], 0)
    operator = torch.ops.graphopt.select_vertical_slash
    operator(*arguments)  # compiles, which no graph can hold
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        replayed = operator(*arguments)
    for seed in range(2):
        torch.manual_seed(seed)
        q.normal_()
        graph.replay()
        expected = operator(*arguments)
        for own, other in zip(replayed, expected, strict=True):
            assert torch.equal(own, other)
