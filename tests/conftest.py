"""Settings for every test: no hub, a cache of its own, one thread a process."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

pytest_plugins = ["pytester"]


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
