"""Build and call the C++ kernel that finds outliers of activations."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from graphopt.codegen.cpp.kernel import DTYPES, entry_point, fill


class _Arguments(ctypes.Structure):
    """Mirrors ``struct OutlierArguments`` of outliers.cpp.in."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "beyond", "channels")),
        *(
            (name, ctypes.c_int64)
            for name in ("rows", "width", "stride", "capacity", "dtype", "threads")
        ),
        *((name, ctypes.c_float) for name in ("low", "high")),
        ("found", ctypes.c_int64),
    )


@cache
def emit_outliers() -> str:
    """Return the C++ source of the kernel."""
    return fill("outliers.cpp.in", {})


@cache
def _outliers() -> Any:
    return entry_point("outliers", emit_outliers(), "graphopt_outliers", _Arguments)


def outliers(
    rows: Tensor, low: float, high: float, capacity: int
) -> tuple[int, Tensor, Tensor]:
    """Return (found, channels int32 [found], beyond float32 [R, found]).

    ``rows`` [R, K]: channels side by side. ``found`` may exceed ``capacity``; then the
    tensors mean nothing. Raises KernelError when the kernel cannot be built here.
    """
    count, width = rows.shape
    beyond = torch.empty(count * capacity)
    channels = torch.empty(capacity, dtype=torch.int32)
    given = _Arguments(
        *(t.data_ptr() for t in (rows, beyond, channels)),
        *(count, width, rows.stride(0), capacity, DTYPES[rows.dtype]),
        torch.get_num_threads(),
        *(low, high, 0),
    )
    _outliers()(ctypes.byref(given))
    found = min(given.found, capacity)
    return given.found, channels[:found], beyond[: count * found].view(count, found)
