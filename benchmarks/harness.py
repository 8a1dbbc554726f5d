"""What every benchmark shares: a quiet machine, honest seconds, kept results.

Figures are ratios of two things measured in one run, turn by turn. A run whose CPU time
over (wall time x threads) is under `BUSY` shared its cores with other work and is made
again; when it never gets there the row says so (``utilisation``).
"""

from __future__ import annotations

import json
import platform
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime
from importlib.metadata import version
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import psutil
import torch

from graphopt.memory import peak_mb, reset_peak

# Every side of a comparison is an entry of the model's own; beyond eight Dynamo would
# run the rest uncompiled.
torch._dynamo.config.recompile_limit = 64

RESULTS = Path(__file__).parent / "results"
BUSY = 0.9
_PACKAGES = ("torch", "triton", "transformers", "graphopt")


@dataclass(frozen=True)
class Seconds:
    """The best run's wall time, and the share of the threads' time that it used."""

    best: float
    utilisation: float


def wait_for_quiet(limit: float = 120.0) -> None:
    """Return when other work takes under a tenth of the machine, or at the limit."""
    end = time.monotonic() + limit
    while psutil.cpu_percent(interval=1.0) > 10.0 and time.monotonic() < end:
        continue


def compare(
    sides: Mapping[str, Callable[[], object]], runs: int = 3, warm: int = 1
) -> dict[str, Seconds]:
    """Time each side ``runs`` times, turn by turn, after ``warm`` runs; keep the best.

    Runs that other work disturbed do not count, up to twice as many tries. A side that
    returns Seconds has timed itself: its work is done in another process.
    """
    for _ in range(warm):
        for function in sides.values():
            function()
    wait_for_quiet()
    found: dict[str, list[Seconds]] = {name: [] for name in sides}
    for _ in range(2 * runs):
        for name, function in sides.items():
            if sum(s.utilisation >= BUSY for s in found[name]) < runs:
                found[name].append(_timed(function))
    return {name: _best(seconds) for name, seconds in found.items()}


def watched(name: str, side: Callable[[], object], peaks: dict[str, float]) -> None:
    """Run ``side``; keep how far the memory rose above what was there, in MB."""
    reset_peak()
    before = peak_mb()
    side()
    peaks[name] = peak_mb() - before


def alone(function: Callable[..., float], *arguments: object) -> float:
    """Call ``function`` in a process of its own, where no freed memory is left."""
    with ProcessPoolExecutor(1, get_context("spawn")) as pool:
        threads = pool.submit(torch.set_num_threads, torch.get_num_threads())
        threads.result()
        return pool.submit(function, *arguments).result()


def _timed(function: Callable[[], object]) -> Seconds:
    cpu, start = time.process_time(), time.perf_counter()
    result = function()
    if isinstance(result, Seconds):
        return result
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return Seconds(time.perf_counter() - start, 1.0)
    wall = time.perf_counter() - start
    used = time.process_time() - cpu
    return Seconds(wall, used / (wall * torch.get_num_threads()))


def _best(seconds: Sequence[Seconds]) -> Seconds:
    clean = [s for s in seconds if s.utilisation >= BUSY]
    return min(clean or seconds, key=lambda s: s.best)


def keep(
    name: str,
    rows: list[dict[str, Any]],
    summary: dict[str, Any],
    *,
    quick: bool,
    notes: str = "",
) -> dict[str, Any]:
    """Return the result as one dictionary; full runs are written under results/."""
    result = {
        "name": name,
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        "machine": machine(),
        "versions": {p: _version(p) for p in _PACKAGES} | {"python": _python()},
        "notes": notes,
        "rows": rows,
        "summary": summary,
    }
    if not quick:
        RESULTS.mkdir(exist_ok=True)
        path = RESULTS / f"{name}-{_kind()}.json"
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"written: {path}", file=sys.stderr)
    return result


def plot(name: str, draw: Callable[[Any], None]) -> None:
    """Let ``draw`` fill the axes of a picture and write it beside the result."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(6.4, 4.0), layout="constrained")
    draw(axes)
    figure.savefig(picture(name), dpi=130)
    pyplot.close(figure)


def picture(name: str) -> Path:
    """Return where a picture lies: beside the result, under its name."""
    RESULTS.mkdir(exist_ok=True)
    return RESULTS / f"{name}-{_kind()}.png"


def machine() -> dict[str, Any]:
    """Return the kind of machine: processor, threads, memory, GPU."""
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {
        "processor": _processor(),
        "threads": torch.get_num_threads(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9),
        "gpu": gpu,
    }


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _kind() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name().lower().replace(" ", "-")
    return f"cpu-{torch.get_num_threads()}-threads"


def _version(package: str) -> str | None:
    return version(package)


def _python() -> str:
    return platform.python_version()
