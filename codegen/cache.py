"""Emitted source on disk: one file per source text, checked before it is used.

A file's name ends in the sha256 of its content, so equal sources share a file and a
changed one cannot be mistaken for the original. Writes go to a temporary name and are
renamed, builds hold a lock: readers never see half a file and two processes that build
the same kernel build it once.
"""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType

from filelock import FileLock

from graphopt.codegen import compiler
from graphopt.errors import KernelError

_loaded: dict[Path, object] = {}


def cache_dir() -> Path:
    """Return the cache directory, created 0700 ($GRAPHOPT_CACHE_DIR or ~/.cache).

    Raises KernelError that names the directory when it cannot be created or written.
    """
    given = os.environ.get("GRAPHOPT_CACHE_DIR")
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    path = Path(given) if given else Path(base) / "graphopt"
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise _unwritable(path, error.strerror or str(error)) from None
    if path.stat().st_uid != os.getuid():
        raise _unwritable(path, "it belongs to another user")
    if not os.access(path, os.W_OK | os.X_OK):
        raise _unwritable(path, "it cannot be written")
    return path


def _unwritable(path: Path, reason: str) -> KernelError:
    return KernelError(
        f"cache directory {path}: {reason}; set GRAPHOPT_CACHE_DIR to a directory "
        "of your own"
    )


def digest(data: bytes) -> str:
    """Return the hash by which a file is named."""
    return hashlib.sha256(data).hexdigest()


def write_source(stem: str, suffix: str, text: str) -> Path:
    """Write ``text`` to <cache>/kernels/<stem>_<hash><suffix> and return the path.

    An existing file with another content (tampered or cut off) is replaced.
    """
    data = text.encode()
    folder = cache_dir() / "kernels"
    folder.mkdir(mode=0o700, exist_ok=True)
    path = folder / f"{stem}_{digest(data)[:32]}{suffix}"
    if not (path.exists() and path.read_bytes() == data):
        write_atomic(path, data)
    return path


def write_atomic(path: Path, data: bytes) -> None:
    """Write ``data`` under a temporary name and rename it to ``path``."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(data)
        temporary.replace(path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise _unwritable(path.parent, error.strerror or str(error)) from None


def load_python(stem: str, text: str) -> ModuleType:
    """Write ``text`` as a module and import it from its file."""
    path = write_source(stem, ".py", text)
    if path not in _loaded:
        spec = importlib.util.spec_from_file_location(path.stem, path)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        # Executing our own text, and not whatever the file holds by now, closes the
        # gap between check and use; the file is what inspect and debuggers read.
        exec(compile(text, str(path), "exec"), module.__dict__)
        _loaded[path] = module
    found = _loaded[path]
    assert isinstance(found, ModuleType)
    return found


def load_cpp(stem: str, text: str, flags: Sequence[str] = ()) -> ctypes.CDLL:
    """Write ``text``, build it as a shared library, and load it.

    The library's name holds the hash of source, compiler and flags; beside it lies the
    hash of the library itself, and one that does not match is built again, never
    loaded. Raises KernelError when there is no compiler or the build fails.
    """
    path = write_source(stem, ".cpp", text)
    if path not in _loaded:
        command = compiler.command(flags)
        name = f"{path.stem}_{digest(repr(command).encode())[:16]}.so"
        library = path.with_name(name)
        with FileLock(f"{library}.lock", mode=0o600):
            if not _is_intact(library):
                _build(command, path, library)
            _loaded[path] = ctypes.CDLL(str(library))
    found = _loaded[path]
    assert isinstance(found, ctypes.CDLL)
    return found


def _is_intact(library: Path) -> bool:
    recorded = library.with_suffix(".sha256")
    if not (library.exists() and recorded.exists()):
        return False
    return recorded.read_text() == digest(library.read_bytes())


def _build(command: Sequence[str], source: Path, library: Path) -> None:
    temporary = library.with_name(f".{library.name}.{os.getpid()}")
    try:
        compiler.build(command, source, temporary)
        write_atomic(
            library.with_suffix(".sha256"), digest(temporary.read_bytes()).encode()
        )
        temporary.replace(library)
    finally:
        temporary.unlink(missing_ok=True)


def loaded_sources() -> list[Path]:
    """Return the emitted files that this process has loaded."""
    return sorted(_loaded)
