"""Build and call the C++ kernel that combines logits and samples."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from graphopt.codegen.cpp.kernel import DTYPES, entry_point, fill

CHUNK = 4096
"""Tokens that a thread takes at once; their logits stay in its cache."""


class _Member(ctypes.Structure):
    """Mirrors ``struct Member`` of combine.cpp.in."""

    _fields_ = (
        ("logits", ctypes.c_void_p),
        ("stride", ctypes.c_int64),
        ("dtype", ctypes.c_int64),
    )


class _Arguments(ctypes.Structure):
    """Mirrors ``struct CombineArguments`` of combine.cpp.in."""

    _fields_ = (
        ("members", ctypes.POINTER(_Member)),
        *((name, ctypes.c_void_p) for name in ("factors", "uniform", "temperature")),
        *((name, ctypes.c_void_p) for name in ("top_p", "tokens")),
        *((name, ctypes.c_int64) for name in ("rows", "vocab", "pairs", "of_base")),
        ("threads", ctypes.c_int64),
    )


@cache
def emit_combine() -> str:
    """Return the C++ source of the kernel."""
    return fill("combine.cpp.in", {"CHUNK": str(CHUNK)})


@cache
def _kernel() -> Any:
    return entry_point("combine", emit_combine(), "graphopt_combine_sample", _Arguments)


def combines(members: Sequence[Tensor]) -> bool:
    """Tell whether the kernel takes logits like these."""
    return all(m.dtype in DTYPES for m in members)


def combine_sample(
    members: Sequence[Tensor],
    factors: Tensor,
    uniform: Tensor | None = None,
    temperature: Tensor | None = None,
    top_p: Tensor | None = None,
    of_base: bool = False,
) -> Tensor:
    """Return a token of each row, int64 [B].

    members: the base [B, V], then tuned and reference of each pair; factors float32
    [P]; the rest as in `graphopt.ops.logits`. Raises KernelError when the kernel cannot
    be built here.
    """
    rows = [m if m.stride(-1) == 1 else m.contiguous() for m in members]
    tokens = torch.empty(rows[0].shape[0], dtype=torch.int64)
    scalars = [_floats(t) for t in (factors, uniform, temperature, top_p)]
    table = (_Member * len(rows))(
        *(_Member(m.data_ptr(), m.stride(0), DTYPES[m.dtype]) for m in rows)
    )
    given = _Arguments(
        table,
        *(None if t is None else t.data_ptr() for t in scalars),
        tokens.data_ptr(),
        tokens.shape[0],
        min(m.shape[-1] for m in rows),
        len(factors),
        *(of_base, torch.get_num_threads()),
    )
    _kernel()(ctypes.byref(given))
    return tokens


def _floats(value: Tensor | None) -> Tensor | None:
    return None if value is None else value.float().contiguous()


__all__ = ["combine_sample", "combines", "emit_combine"]
