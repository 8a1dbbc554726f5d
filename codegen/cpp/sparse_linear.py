"""Build and call the C++ kernels that read only the weights that count."""

from __future__ import annotations

import ctypes
from functools import cache
from typing import Any

import torch
from torch import Tensor

from graphopt.codegen.cpp.kernel import DTYPES, entry_point, fill, supports

MOST_ROWS = 8


class _SparseArguments(ctypes.Structure):
    """Mirrors ``struct SparseArguments`` of sparse_linear.cpp.in."""

    _fields_ = (
        *(
            (name, ctypes.c_void_p)
            for name in ("x", "w", "bias", "gate", "threshold", "out")
        ),
        *(
            (name, ctypes.c_int64)
            for name in ("rows", "width", "outputs", "stride", "dtype", "threads")
        ),
    )


@cache
def emit() -> str:
    """Return the C++ source of the kernels."""
    return fill("sparse_linear.cpp.in", {})


@cache
def _kernel(symbol: str) -> Any:
    return entry_point("sparse_linear", emit(), symbol, _SparseArguments)


def columns(
    input: Tensor, weight: Tensor, bias: Tensor | None, threshold: Tensor
) -> Tensor:
    """Return input [..., K] times weight [K, N], as `graphopt.ops.sparse_linear`.

    ``input`` has at most `MOST_ROWS` rows and is contiguous, as is ``bias``; rows of
    the weight lie in one piece each. ``threshold`` is one float32. Raises KernelError
    when the kernel cannot be built here.
    """
    out = input.new_empty((*input.shape[:-1], weight.shape[1]))
    _run("graphopt_sparse_columns", input, weight, bias, None, threshold, out)
    return out


def neurons(
    input: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, threshold: Tensor
) -> Tensor:
    """Return gate times up, [..., N]; weight [N, K], as `graphopt.ops.sparse_up`.

    Operands as for `columns`; gate [..., N] is contiguous.
    """
    out = torch.empty_like(gate)
    _run("graphopt_sparse_neurons", input, weight, bias, gate, threshold, out)
    return out


def _run(
    symbol: str,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    gate: Tensor | None,
    threshold: Tensor,
    out: Tensor,
) -> None:
    width, outputs = input.shape[-1], out.shape[-1]
    given = _SparseArguments(
        input.data_ptr(),
        weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        None if gate is None else gate.data_ptr(),
        threshold.data_ptr(),
        out.data_ptr(),
        out.numel() // max(outputs, 1),
        width,
        outputs,
        weight.stride(0),
        DTYPES[input.dtype],
        torch.get_num_threads(),
    )
    _kernel(symbol)(ctypes.byref(given))


__all__ = ["MOST_ROWS", "columns", "emit", "neurons", "supports"]
