"""A process in which Triton interprets kernels, beside this one, in which it compiles.

Triton reads TRITON_INTERPRET when it is imported: its own library functions are
interpreted or compiled from then on, and no process can do both.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

import pytest

from graphopt.codegen.triton.interpreter import is_interpreted
from tests.codegen.triton.quick import quicken


@pytest.fixture(scope="package")
def interpreter(tmp_path_factory: pytest.TempPathFactory) -> Iterator[object]:
    """``interpreter.submit(function, *arguments).result()`` runs it interpreted."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TRITON_INTERPRET", "1")
        patch.setenv("GRAPHOPT_CACHE_DIR", str(tmp_path_factory.mktemp("kernels")))
        pool = ProcessPoolExecutor(1, get_context("spawn"), quicken)
        assert pool.submit(is_interpreted).result()
    with pool:
        yield pool
