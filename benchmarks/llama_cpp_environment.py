"""Where llama.cpp lives: an environment of its own, made once, never the project's.

llama-cpp-python brings its own numpy and a C++ library that it builds when installed;
neither may change what graphopt is measured with.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

from filelock import FileLock

from graphopt.codegen.cache import cache_dir
from graphopt.errors import GraphoptError

PACKAGE = "llama-cpp-python==0.3.36"
VARIABLE = "GRAPHOPT_LLAMA_CPP_PYTHON"


def interpreter() -> Path:
    """Return a Python that has llama_cpp: `VARIABLE`'s, or that of an own environment.

    The environment is made in the cache directory when it is not there (a C++ build,
    about ten minutes). Raises GraphoptError where there is none and none can be made.
    """
    if given := os.environ.get(VARIABLE):
        return _given(Path(given).expanduser())
    folder = cache_dir() / PACKAGE.replace("==", "-")
    python, done = folder / "bin" / "python", folder / "complete"
    with FileLock(f"{folder}.lock", mode=0o600):
        if not done.exists():
            _make(folder, python)
            done.touch()
    return python


def _given(python: Path) -> Path:
    try:
        found = subprocess.run(
            [python, "-I", "-c", "import llama_cpp"], capture_output=True, text=True
        )
        cause = _last_line(found.stderr) if found.returncode else ""
    except OSError as error:
        cause = str(error)
    if cause:
        raise GraphoptError(
            f"{VARIABLE}={python} cannot import llama_cpp ({cause}): install it there "
            f"({python} -m pip install {PACKAGE}), or unset the variable and the "
            "benchmark makes an environment of its own"
        )
    return python


def _make(folder: Path, python: Path) -> None:
    """Make the environment; what a try before left behind goes first."""
    shutil.rmtree(folder, ignore_errors=True)
    log = folder.with_suffix(".log")
    print(
        f"building {PACKAGE} in {folder}, about ten minutes (log: {log})",
        file=sys.stderr,
        flush=True,
    )
    steps = (
        [sys.executable, "-m", "venv", str(folder)],
        [str(python), "-m", "pip", "install", "--disable-pip-version-check", PACKAGE],
    )
    with log.open("w+") as output:
        for step in steps:
            status = subprocess.run(step, stdout=output, stderr=subprocess.STDOUT)
            if status.returncode:
                output.seek(0)
                raise _not_made(_last_line(output.read()), log)


def _not_made(cause: str, log: Path) -> GraphoptError:
    return GraphoptError(
        f"bench llama-cpp: no environment with llama.cpp, and none could be built "
        f"({cause}; log: {log}). A build needs a C++ compiler and a package index in "
        f"reach (pip install {PACKAGE}); or set {VARIABLE} to a Python that has "
        "llama_cpp"
    )


def _last_line(text: str) -> str:
    """Return the last line that says something: pip ends in advice to upgrade."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    errors = [line for line in lines if "error" in line.lower()]
    return (errors or lines or ["no output"])[-1]
