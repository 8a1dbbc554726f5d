"""Build and call the C++ kernel that adds what int8 codes clipped away."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from graphopt.codegen.cpp.kernel import DTYPES, entry_point, fill


class _Arguments(ctypes.Structure):
    """Mirrors ``struct ShadowArguments`` of shadow.cpp.in."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("x", "columns", "out", "used")),
        *((name, ctypes.c_int64) for name in ("rows", "width", "outputs", "stride")),
        *((name, ctypes.c_int64) for name in ("limit", "dtype", "threads")),
        *((name, ctypes.c_float) for name in ("low", "high")),
        ("found", ctypes.c_int64),
    )


@cache
def emit_shadow() -> str:
    """Return the C++ source of the kernel."""
    return fill("shadow.cpp.in", {})


@cache
def _shadow() -> Any:
    return entry_point("shadow", emit_shadow(), "graphopt_shadow", _Arguments)


def add_shadow(
    rows: Tensor,
    low: float,
    high: float,
    columns: Tensor,
    used: Tensor,
    limit: int,
    out: Tensor,
) -> int:
    """Add to ``out`` float32 [R, N] what ``rows`` [R, K] have beyond ``low``..``high``.

    ``columns`` float32 [K, N]; ``used`` uint8 [K] is set for those that are read.
    Channels of ``rows`` lie side by side. Returns how many values lay beyond; where
    they are more than ``limit``, ``out`` means nothing. Raises KernelError when the
    kernel cannot be built here.
    """
    given = _Arguments(
        *(t.data_ptr() for t in (rows, columns, out, used)),
        *(*rows.shape, columns.shape[1], rows.stride(0), limit, DTYPES[rows.dtype]),
        torch.get_num_threads(),
        *(low, high, 0),
    )
    _shadow()(ctypes.byref(given))
    return int(given.found)
