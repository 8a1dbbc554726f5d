"""Build and call the C++ kernels that count neurons and gather their weights."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from graphopt.codegen.cpp.kernel import DTYPES, entry_point, fill
from graphopt.codegen.neurons import PARTS


class _CountArguments(ctypes.Structure):
    """Mirrors ``struct CountArguments`` of neurons.cpp.in."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("inner", "mask", "counts")),
        *((name, ctypes.c_int64) for name in ("rows", "tokens", "neurons", "parts")),
        *(
            (name, ctypes.c_int64)
            for name in ("absolute", "weight", "dtype", "threads")
        ),
    )


class _GatherArguments(ctypes.Structure):
    """Mirrors ``struct GatherArguments`` of neurons.cpp.in."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("weight", "places", "buffer")),
        *((name, ctypes.c_int64) for name in ("choices", "kept", "width", "neurons")),
        *((name, ctypes.c_int64) for name in ("columns", "itemsize", "threads")),
    )


@cache
def emit_neurons() -> str:
    """Return the C++ source of the kernels."""
    return fill("neurons.cpp.in", {"PARTS": str(PARTS)})


@cache
def _kernel(symbol: str, structure: type[ctypes.Structure]) -> Any:
    return entry_point("neurons", emit_neurons(), symbol, structure)


def counts(inner: Tensor) -> bool:
    """Tell whether the kernel counts values like ``inner``."""
    return inner.dtype in DTYPES


def count(
    inner: Tensor,
    mask: Tensor | None,
    counts: Tensor,
    parts: int,
    absolute: bool = False,
    weight: int = 1,
) -> None:
    """Add to counts int32 [R, F] what inner [R, N, F] has; mask bool [R, N] or None.

    As `graphopt.ops.neurons.count`. Raises KernelError when the kernel cannot be built
    here.
    """
    inner, mask = inner.contiguous(), None if mask is None else mask.contiguous()
    given = _CountArguments(
        inner.data_ptr(),
        None if mask is None else mask.data_ptr(),
        counts.data_ptr(),
        *(*inner.shape, parts, absolute, weight),
        *(DTYPES[inner.dtype], torch.get_num_threads()),
    )
    _kernel("graphopt_count_neurons", _CountArguments)(ctypes.byref(given))


def gathers(weight: Tensor, buffer: Tensor) -> bool:
    """Tell whether the kernel copies between tensors like these."""
    alike = weight.dtype == buffer.dtype and weight.itemsize in (2, 4, 8)
    return alike and weight.is_contiguous() and buffer.is_contiguous()


def gather(weight: Tensor, places: Tensor, buffer: Tensor, dim: int) -> None:
    """Copy what lies at ``places`` int64 [R, P] along ``dim`` of the weight.

    Raises KernelError when the kernel cannot be built here.
    """
    given = _GatherArguments(
        *(weight.data_ptr(), places.data_ptr(), buffer.data_ptr()),
        *places.shape,
        weight.numel() // weight.shape[dim],
        *(weight.shape[dim], dim, weight.itemsize, torch.get_num_threads()),
    )
    _kernel("graphopt_gather_neurons", _GatherArguments)(ctypes.byref(given))


__all__ = ["count", "counts", "emit_neurons", "gather", "gathers"]
