"""Settings for every test: no hub, a cache of its own, one thread a process."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest

# As many processes as cores, each with as many threads, wait for each other's threads:
# five times the CPU time. Tests of threads set their number.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
# Operators whose results have other strides than they promise are found here.
os.environ.setdefault("TORCHINDUCTOR_SIZE_ASSERTS", "1")
# Else each empty cache builds and loads six programs to see what the compiler knows.
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")
# In models of two layers hardly a call comes again, and remembering calls takes a fifth
# of the time of tracing.
os.environ.setdefault("TORCH_FAKE_TENSOR_DISPATCH_CACHE", "0")

pytest_plugins = ["pytester"]


def pytest_collection_finish() -> None:
    """What was imported stays: to walk over it again and again took an eighth."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(50_000, 10, 10)


def pytest_sessionfinish() -> None:
    """Else libraries count what is frozen as leaked when the process ends."""
    gc.unfreeze()


@pytest.fixture
def kernel_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Point graphopt at an empty cache directory and return its path."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("GRAPHOPT_CACHE_DIR", str(folder))
    return folder


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> None:
    import torch

    torch._dynamo.reset()
    # Else it formats the stack of every write to a cache, a tenth of tracing it.
    torch._dynamo.config.side_effect_replay_policy = "silent"
