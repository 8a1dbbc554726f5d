"""The choice of key blocks in Triton: interpreted, and compiled ahead of time."""

from __future__ import annotations

import ast
import itertools
import re
from unittest import mock

import pytest
import torch

from graphopt.codegen.targets import TARGETS
from graphopt.codegen.triton.select_ahead import compile_blocks, compile_strided
from graphopt.codegen.triton.select_blocks import emit_blocks, launch
from graphopt.codegen.triton.select_strided import BLOCK, StridedSpec, emit_strided
from graphopt.errors import KernelError
from graphopt.ops import block_device, block_selection
from graphopt.ops.block_kinds import STRIDED_BLOCK
from graphopt.ops.block_runs import runs_of
from tests.codegen.triton.pairwise import name_of as pair_name
from tests.codegen.triton.pairwise import on_two
from tests.ops.test_block_selection import MIXED, STRIDED, padding
from tests.oracle import TOLERANCE, tensors

GPUS = [target for target in TARGETS.values() if target.is_gpu]
CHOICES = ("mass", "best", "all")

# queries, keys, cap, padding, tables, dtype
CASES = [
    (1, 700, 256, "left", MIXED, torch.float32),
    (333, 777, 1, "holes", MIXED, torch.bfloat16),
    (600, 600, 2, "right", MIXED, torch.float16),
    (500, 500, 1, "none", STRIDED, torch.bfloat16),
    (640, 701, 256, "right", STRIDED, torch.float32),
    (65, 900, 3, "holes", ([0], [8], [1.0], 64), torch.float32),
    (333, 400, 256, "left", ([2], [0], [1.0], 32), torch.float16),
]


def name_of(case):
    queries, keys, cap, kind, _, dtype = case
    return f"{queries}x{keys} cap={cap} {kind} {dtype}"


def check(case, device="cpu", dim=16):
    queries, keys, cap, kind, tables, dtype = case
    q, k, _ = tensors(6, 2, queries, keys, dim, dtype, batch=2)
    key_mask = padding(kind, 2, keys)
    given = (t if t is None else t.to(device) for t in (2 * q, k, key_mask))
    arguments = (*given, *tables, keys - queries, 0.7, 3.0, 0, cap)
    found = block_selection._cuda(*arguments)
    wanted = block_selection.select_blocks_reference(*arguments)
    for own, other in zip(found, wanted, strict=True):
        assert own.dtype == other.dtype
        # Masses that are equal but for rounding may change places.
        assert (own != other).double().mean() < 2e-3


@pytest.mark.parametrize("case", CASES, ids=name_of)
def test_lists_are_the_reference(interpreter, case):
    interpreter.submit(check, case).result()


def check_part(*arguments):
    """As `check`, with a map that is made row block by row block."""
    with mock.patch.object(block_device, "_HELD", 1):
        check(*arguments)


@pytest.mark.parametrize("dim", [16, 24])
def test_a_map_in_parts_gives_the_same_lists(interpreter, dim):
    interpreter.submit(check_part, CASES[4], "cpu", dim).result()
    interpreter.submit(check_part, CASES[6], "cpu", dim).result()


def kept_by_hand(worth, choice, wanted, forced):
    """What one row keeps, boolean [K]; worths are small whole numbers."""
    kept = list(forced)
    least = 0 if choice == "mass" else float("-inf")
    free = [j for j, own in enumerate(forced) if not own and worth[j] > least]
    for j in sorted(free, key=lambda j: (-worth[j], j)):
        have = sum(worth[i] for i, own in enumerate(kept) if own)
        enough = wanted * sum(worth) if choice == "mass" else wanted
        if (have if choice == "mass" else sum(kept)) < enough:
            kept[j] = True
    return kept


def check_ties(choice, wanted, cap, device="cpu"):
    """Worths of a few values, so that most are equal, and lists that hold few runs."""
    torch.manual_seed(cap)
    rows, block, keys = 3, 64, 40
    sizes = (rows * block, keys * block - 10, (keys - rows) * block - 10)
    worth = torch.randint(0, 4, (2, 2, rows, keys)).float()
    if choice == "best":
        worth = (worth - 2).masked_fill(worth == 3, float("nan"))
        worth[..., ::7] = -0.0
    runs = torch.zeros(2, 2, rows, cap, 2, dtype=torch.int16, device=device)
    count = torch.zeros(2, 2, rows, dtype=torch.int32, device=device)
    shown = torch.ones(1, keys, dtype=torch.bool, device=device)
    rest = ((1, 0), range(rows), sizes, block, block)
    shown = None if choice == "mass" else shown
    launch(choice, wanted, worth.to(device), shown, (runs, count), *rest)
    for batch, head, row in torch.cartesian_prod(*map(torch.arange, (2, 2, rows))):
        own = worth[batch, head, row].nan_to_num(float("-inf")).tolist()
        first = int(row) * block + sizes[2]
        last = (first + block - 1) // block
        own = own[: last + 1]
        forced = [j == 0 or j >= first // block for j in range(last + 1)]
        kept = torch.tensor([kept_by_hand(own, choice, wanted, forced)])
        expected, number = runs_of(kept, cap)
        assert torch.equal(runs[batch, 1 - head, row].cpu(), expected[0])
        assert count[batch, 1 - head, row] == number[0]


TIES = [("mass", 0.6, 20), ("mass", 0.1, 4), ("mass", 0.97, 2), ("best", 9, 20)]
TIES += [("best", 2, 20), ("best", 30, 3), ("best", 39, 20)]


@pytest.mark.parametrize("ties", TIES, ids=str)
def test_equal_worths_go_to_the_lower_block(interpreter, ties):
    interpreter.submit(check_ties, *ties).result()


def strided_specs():
    sizes = itertools.product(TOLERANCE, (16, 72, 128), (4, 8, 16), (False, True))
    return [StridedSpec(dtype, dim, 4, *rest) for dtype, dim, *rest in sizes]


def test_the_text_stands_alone():
    sources = [*map(emit_blocks, CHOICES), *map(emit_strided, strided_specs())]
    for source in sources:
        assert not re.findall(r"^\s*%.*|@[A-Z_]+@|[{}]", source, re.MULTILINE)
        assert max(map(len, source.splitlines())) <= 88
        imports = [n for n in ast.walk(ast.parse(source)) if isinstance(n, ast.Import)]
        names = {name.name for node in imports for name in node.names}
        assert names == {"torch", "triton", "triton.language"}
    assert len(set(sources)) == len(sources)
    assert len({spec.name for spec in strided_specs()}) == len(strided_specs())


def test_blocks_are_those_of_the_reference():
    assert BLOCK == STRIDED_BLOCK


def test_what_has_no_kernel_is_refused():
    with pytest.raises(KernelError, match=r"float64; it takes .*bfloat16"):
        StridedSpec(torch.float64, 64, 1, 8)
    lists = torch.zeros(1, 1, 2, 2, 2), torch.zeros(1, 1, 2)
    rest = ((0,), range(1), (9, 9, 0), 64, 64)
    with pytest.raises(KernelError, match="TRITON_INTERPRET=1"):
        launch("all", 1.0, None, torch.ones(1, 1), lists, *rest)


ESTIMATES = [
    (torch.bfloat16, 128, 8, False),
    (torch.float16, 80, 16, True),
    (torch.float32, 128, 4, False),
]


@pytest.mark.parametrize(("estimate", "target"), on_two(ESTIMATES, GPUS), ids=pair_name)
def test_estimates_compile_without_spills(estimate, target):
    dtype, dim, stride, softcap = estimate
    spec = StridedSpec(dtype, dim, 4, stride, softcap)
    compiled = compile_strided(spec, target)
    assert compiled.spills == 0
    assert 0 < compiled.shared_memory <= target.shared_memory
    single = dtype == torch.float32
    assert compiled.has_wgmma == (target.name == "sm_90" and not single)


# Each choice for one target of each maker, and each target for one choice.
NAMES = {
    "mass": ("sm_90", "gfx942"),
    "best": ("sm_100", "gfx942"),
    "all": ("sm_80", "gfx942"),
}


@pytest.mark.parametrize(
    ("choice", "target"),
    [(choice, TARGETS[name]) for choice in CHOICES for name in NAMES[choice]],
    ids=lambda given: str(getattr(given, "name", given)),
)
def test_compiles_for_every_target(target, choice):
    """128 thousand tokens without spills; two millions fit into shared memory."""
    narrow, wide = (compile_blocks(choice, target, n) for n in (1024, 16384))
    assert narrow.spills == 0
    assert wide.shared_memory <= target.shared_memory


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("case", CASES, ids=name_of)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_on_the_device(case, dtype):
    check((*case[:5], dtype), "cuda")


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("ties", TIES, ids=str)
def test_ties_on_the_device(ties):
    check_ties(*ties, device="cuda")


@pytest.mark.gpu
@on_gpu
@pytest.mark.parametrize("kind", ["none", "holes"])
def test_a_cuda_graph_replays_the_operator(kind):
    q, k, _ = tensors(6, 2, 900, 900, 64, torch.bfloat16, batch=2)
    q, k = q.cuda(), k.cuda()
    key_mask = padding(kind, 2, 900)
    key_mask = key_mask if key_mask is None else key_mask.cuda()
    arguments = (q, k, key_mask, *MIXED, 0)
    operator = torch.ops.graphopt.select_blocks
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
