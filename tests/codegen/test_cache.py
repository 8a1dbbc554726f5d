"""Emitted files: locks, hashes, permissions, and clear errors."""

from __future__ import annotations

import os
import stat
import subprocess
import sys

import pytest

from graphopt.codegen import cache, compiler
from graphopt.errors import KernelError

ADD = 'extern "C" __attribute__((visibility("default"))) int f() { return %d; }\n'


@pytest.fixture(autouse=True)
def _forget_loaded(monkeypatch):
    monkeypatch.setattr(cache, "_loaded", {})


def test_the_directory_is_private(kernel_cache):
    path = cache.write_source("one", ".cpp", "x")
    assert stat.S_IMODE(kernel_cache.stat().st_mode) == 0o700
    assert path.parent.parent == kernel_cache
    assert cache.digest(b"x")[:32] in path.name


def test_build_and_load(kernel_cache):
    assert cache.load_cpp("seven", ADD % 7).f() == 7
    assert not [p for p in (kernel_cache / "kernels").iterdir() if p.name[0] == "."]


def test_a_tampered_source_is_written_anew(kernel_cache):
    path = cache.write_source("one", ".cpp", ADD % 1)
    path.write_text(ADD % 2)
    assert cache.load_cpp("one", ADD % 1).f() == 1


@pytest.mark.parametrize("damage", ["library", "hash"])
def test_a_tampered_library_is_never_loaded(kernel_cache, monkeypatch, damage):
    cache.load_cpp("one", ADD % 1)
    folder = kernel_cache / "kernels"
    library = next(folder.glob("*.so"))
    if damage == "library":
        library.unlink()  # the mapped file itself must stay whole
        library.write_bytes(b"not a library")
    else:
        next(folder.glob("*.sha256")).write_text("0" * 64)
    monkeypatch.setattr(cache, "_loaded", {})
    assert cache.load_cpp("one", ADD % 1).f() == 1
    assert cache._is_intact(library)


def test_a_failing_build_leaves_nothing(kernel_cache):
    with pytest.raises(KernelError, match="failed on"):
        cache.load_cpp("bad", "this is not C++")
    left = {p.suffix for p in (kernel_cache / "kernels").iterdir()}
    assert not left & {".so", ".sha256"}


def test_no_compiler(kernel_cache, monkeypatch):
    monkeypatch.setenv("PATH", str(kernel_cache))
    monkeypatch.delenv("CXX", raising=False)
    compiler.find.cache_clear()
    try:
        with pytest.raises(KernelError, match="compiler"):
            cache.load_cpp("none", ADD % 3)
    finally:
        monkeypatch.undo()
        compiler.find.cache_clear()


def test_a_compiler_that_does_not_exist(kernel_cache, monkeypatch):
    monkeypatch.setenv("CXX", "/nowhere/g++")
    compiler.find.cache_clear()
    try:
        with pytest.raises(KernelError, match="CXX"):
            cache.load_cpp("none", ADD % 4)
    finally:
        monkeypatch.undo()
        compiler.find.cache_clear()


def test_an_unusable_directory(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("GRAPHOPT_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(KernelError, match="GRAPHOPT_CACHE_DIR"):
        cache.cache_dir()


@pytest.mark.skipif(os.getuid() == 0, reason="root may write anywhere")
def test_a_read_only_directory(tmp_path, monkeypatch):
    tmp_path.chmod(0o500)
    monkeypatch.setenv("GRAPHOPT_CACHE_DIR", str(tmp_path))
    with pytest.raises(KernelError, match="cannot be written"):
        cache.cache_dir()


def test_two_processes_build_one_library(kernel_cache):
    program = (
        "from graphopt.codegen.cache import load_cpp\n"
        f"print(load_cpp('both', {ADD % 5!r}).f())\n"
    )
    runs = [
        subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE)
        for _ in range(3)
    ]
    assert [run.communicate()[0].strip() for run in runs] == [b"5"] * 3
    assert len(list((kernel_cache / "kernels").glob("*.so"))) == 1


def test_python_modules_run_the_text_that_was_checked(kernel_cache):
    module = cache.load_python("numbers", "VALUE = 3\n")
    assert module.VALUE == 3
    assert cache.loaded_sources() == [
        cache.write_source("numbers", ".py", "VALUE = 3\n")
    ]
