"""The emitted Triton attention kernel in Triton's interpreter, against the oracle."""

from __future__ import annotations

import pytest
import torch

from graphopt.codegen.triton.attention import launch
from graphopt.codegen.triton.spec import AttentionSpec
from graphopt.errors import KernelError
from tests.codegen.triton.cases import FACTORS, SINGLE, Case, check
from tests.codegen.triton.packed_cases import PackedCase, check_packed
from tests.codegen.triton.pairwise import pairwise
from tests.oracle import tensors


@pytest.mark.parametrize("case", SINGLE, ids=str)
def test_single(interpreter, case):
    interpreter.submit(check, case).result()


@pytest.mark.parametrize("case", [Case(**c) for c in pairwise(FACTORS)], ids=str)
def test_pairwise(interpreter, case):
    interpreter.submit(check, case).result()


@pytest.mark.parametrize(
    "case",
    [
        PackedCase("causal", masked=True),
        PackedCase("sliding-window", window=9, softcap=5.0),
        PackedCase("full", dtype=torch.bfloat16, masked=True, tile=(16, 64)),
    ],
    ids=str,
)
def test_packed(interpreter, case):
    interpreter.submit(check_packed, case).result()


def test_no_rows_give_an_empty_result(interpreter):
    q, k, v = tensors(4, 2, 0, 9, 64)
    arguments = (q, k, v, None, "causal", [0], [0], 9, None, 0.0)
    assert interpreter.submit(launch, *arguments).result().shape == (1, 4, 0, 64)


def test_this_process_compiles_and_names_the_way_to_interpret():
    q, k, v = tensors(1, 1, 8, 8, 64)
    with pytest.raises(KernelError, match="TRITON_INTERPRET=1"):
        launch(q, k, v, None, "causal", [0], [0], 0, None, 0.0)


def test_a_dtype_without_kernel_is_refused():
    with pytest.raises(KernelError, match=r"float64; it takes .*bfloat16"):
        AttentionSpec("causal", torch.float64, 64, 64, 1)
