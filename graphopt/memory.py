"""The process's resident memory: its peak from a moment on, and what leaves it."""

from __future__ import annotations

import ctypes
import mmap
import re
import resource
import sys
from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

_STATUS, _CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
_SMAPS = Path("/proc/self/smaps")


def reset_peak() -> None:
    """Start the peak anew (Linux); elsewhere it stays that of the whole process."""
    try:
        _CLEAR.write_text("5")
    except OSError:
        return


def peak_mb() -> float:
    """Return the peak resident memory in MB (10^6 bytes)."""
    if _STATUS.exists():
        for line in _STATUS.read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024 / 1e6
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e6


# Of Linux: forget what a process maps; of 5.4: drop pages that are as in the file.
_DONT_NEED, _PAGE_OUT = 4, 21


def page_out(tensor: Tensor) -> None:
    """Let go of the memory of ``tensor`` as far as a file holds it; it stays readable.

    Models that were loaded from safetensors are maps of the file, which stay whole as
    long as one of their parameters is used. Does nothing where the system cannot.
    """
    _advise(tensor, _PAGE_OUT)


def forget(tensor: Tensor) -> None:
    """Let go of the memory of a contiguous ``tensor`` that nothing reads any more.

    Its values are lost. Other processes may map the same file, which `page_out` heeds.
    """
    _advise(tensor, _DONT_NEED)


def page_out_files(suffix: str) -> None:
    """Let go of the memory of mapped files of this name; they stay readable.

    A rank that has copied its part out of a model's files does not need the rest, and
    what it uses of them comes back when it is read. Maps that were written to stay.
    """
    if not _SMAPS.exists():
        return
    for start, end, written in _mapped(suffix):
        if not written:
            _advise_range(start, end - start, _DONT_NEED)


def _mapped(suffix: str) -> Iterator[tuple[int, int, bool]]:
    """Return where mapped files lie, and whether a map was written to."""
    where: tuple[int, int] | None = None
    for line in _SMAPS.read_text().splitlines():
        if head := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            found = line.endswith(suffix)
            where = (int(head[1], 16), int(head[2], 16)) if found else None
        elif where is not None and line.startswith("Anonymous:"):
            yield *where, int(line.split()[1]) > 0


def _advise(tensor: Tensor, advice: int) -> None:
    """Give the system advice on the whole pages of a tensor in main memory."""
    page = mmap.PAGESIZE
    start = -(-tensor.data_ptr() // page) * page
    size = (tensor.data_ptr() + tensor.nbytes - start) // page * page
    _advise_range(start, size, advice)


def _advise_range(start: int, size: int, advice: int) -> None:
    if sys.platform == "linux" and size > 0:
        advise = ctypes.CDLL(None).madvise
        advise(ctypes.c_void_p(start), ctypes.c_size_t(size), advice)
