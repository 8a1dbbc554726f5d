"""The C++ compiler: found, described and called."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path

import torch

from graphopt.errors import KernelError


@cache
def find() -> list[str]:
    """Return the compiler's command ($CXX, g++, clang++ or c++).

    Raises KernelError with the remedy when there is none.
    """
    given = os.environ.get("CXX")
    for candidate in [given] if given else ["g++", "clang++", "c++"]:
        words = shlex.split(candidate)
        if words and shutil.which(words[0]):
            return words
    sought = f"CXX={given}" if given else "g++, clang++ and c++"
    raise KernelError(
        f"no C++ compiler ({sought}): install g++ or set CXX to a compiler with OpenMP"
    )


@cache
def version() -> str:
    """Return the first line of the compiler's ``--version``."""
    output = subprocess.run([*find(), "--version"], capture_output=True, text=True)
    return output.stdout.splitlines()[0] if output.stdout else "unknown"


@cache
def vector_flags() -> tuple[str, ...]:
    """Return flags that select ATen's vector width for this processor."""
    level = torch.backends.cpu.get_cpu_capability()
    if level in ("AVX512", "AVX2"):
        return (f"-DCPU_CAPABILITY={level}", f"-DCPU_CAPABILITY_{level}")
    return ("-DCPU_CAPABILITY=DEFAULT", "-DCPU_CAPABILITY_DEFAULT")


def command(flags: Sequence[str] = ()) -> list[str]:
    """Return the build command up to source and output.

    The processor's model is part of it through ``-march=native`` resolved here, since a
    cache directory may be shared by machines that differ.
    """
    root = Path(torch.__file__).parent
    abi = int(torch.compiled_with_cxx11_abi())
    return [
        *find(),
        *(
            "-std=c++20",
            "-O3",
            "-march=native",
            "-fno-math-errno",
            "-ffp-contract=fast",
        ),
        *("-fopenmp", "-fPIC", "-shared", "-fvisibility=hidden", "-w"),
        f"-D_GLIBCXX_USE_CXX11_ABI={abi}",
        *vector_flags(),
        f"-I{root / 'include'}",
        f"-DGRAPHOPT_MACHINE={_machine()}",
        *flags,
        f"-L{root / 'lib'}",
    ]


@cache
def _machine() -> str:
    """Return a number for what ``-march=native`` means here."""
    from zlib import crc32

    query = [*find(), "-march=native", "-Q", "--help=target"]
    output = subprocess.run(query, capture_output=True).stdout
    return str(crc32(output + version().encode() + torch.__version__.encode()))


def build(command: Sequence[str], source: Path, output: Path) -> None:
    """Build ``source`` into ``output``; KernelError holds the first errors."""
    libraries = ["-ltorch_cpu", "-lc10"]
    result = subprocess.run(
        [*command, str(source), "-o", str(output), *libraries],
        capture_output=True,
        text=True,
    )
    if result.returncode != 0:
        errors = [line for line in result.stderr.splitlines() if "error" in line][:5]
        text = "\n".join(errors) or result.stderr[-2000:]
        raise KernelError(f"{command[0]} failed on {source}:\n{text}")
