"""Emit, build and call the C++ attention kernel of a pattern."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from graphopt.codegen.cache import load_cpp
from graphopt.codegen.predicates import KeyRun, intervals, key_runs, predicate
from graphopt.codegen.printers import to_cpp

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_KEY_BLOCK, _ROW_BLOCK = 256, 192


class _Arguments(ctypes.Structure):
    """Mirrors ``struct Arguments`` of attention.cpp.in, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "out", "key_mask")),
        *((name, ctypes.c_void_p) for name in ("sink", "window")),
        *(
            (name, ctypes.c_int64)
            for name in ("batch", "num_heads", "num_kv_heads", "query_len", "kv_len")
        ),
        *((name, ctypes.c_int64) for name in ("head_dim", "value_dim")),
        *((f"{name}_strides", ctypes.c_int64 * 4) for name in "qkv"),
        ("mask_strides", ctypes.c_int64 * 2),
        *((name, ctypes.c_int64) for name in ("query_offset", "dtype", "threads")),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
    )


@cache
def emit(pattern: str) -> str:
    """Return the C++ source of the kernel for ``pattern``."""
    pred = predicate(pattern)
    runs = key_runs(pred)
    text = files("graphopt.codegen.cpp").joinpath("attention.cpp.in").read_text()
    parts = {
        "PATTERN": pattern,
        "PREDICATE": to_cpp(pred.expr),
        "KEY_BLOCK": str(_KEY_BLOCK),
        "ROW_BLOCK": str(_ROW_BLOCK),
        "RUN_COUNT": str(len(runs)),
        "RUNS": "\n".join(_print_run(i, run) for i, run in enumerate(runs)),
        "VISIBLE": "\n".join(_print_visible(i) for i in intervals(pred)),
    }
    for name, value in parts.items():
        text = text.replace(f"@{name}@", value)
    return text


def _print_run(index: int, run: KeyRun) -> str:
    bounds = (run.begin, run.end, run.full_begin, run.full_end)
    values = ", ".join("kv_len" if b is None else to_cpp(b) for b in bounds)
    return f"  runs[{index}] = {{{values}}};"


def _print_visible(interval: Any) -> str:
    lower = "0" if interval.lower is None else to_cpp(interval.lower)
    upper = "kv_len" if interval.upper is None else to_cpp(interval.upper)
    return f"  visible({lower}, {upper});"


@cache
def _kernel(pattern: str) -> Any:
    library = load_cpp(
        f"attention_{pattern.replace('-', '_')}", emit(pattern), _flags()
    )
    function = library.graphopt_attention
    function.restype = None
    function.argtypes = (ctypes.POINTER(_Arguments),)
    return function


@cache
def _flags() -> tuple[str, ...]:
    """Without an exported sgemm (a torch built on another BLAS) use plain loops."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    has_sgemm = hasattr(ctypes.CDLL(str(library)), "sgemm_")
    return () if has_sgemm else ("-DGRAPHOPT_OWN_GEMM",)


def supports(dtype: torch.dtype) -> bool:
    """Tell whether the kernel takes ``dtype``."""
    return dtype in _DTYPES


def launch(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    key_mask: torch.Tensor | None,
    pattern: str,
    sink: Sequence[int],
    window: Sequence[int],
    query_offset: int,
    scale: float,
    softcap: float,
) -> torch.Tensor:
    """Run the kernel; shapes and arguments as `graphopt.ops.attention`.

    Raises KernelError when the kernel cannot be built here.
    """
    batch, heads, rows, dim = query.shape
    value_dim = value.shape[-1]
    out = query.new_empty((batch, heads, rows, value_dim))
    table = ctypes.c_int64 * heads
    tables = [table(*(list(v) * heads)[:heads]) for v in (sink, window)]
    mask_strides = (0, 0) if key_mask is None else key_mask.stride()
    arguments = _Arguments(
        *(t.data_ptr() for t in (query, key, value, out)),
        None if key_mask is None else key_mask.data_ptr(),
        *(ctypes.cast(t, ctypes.c_void_p) for t in tables),
        *(batch, heads, key.shape[1], rows, key.shape[2], dim, value_dim),
        *((ctypes.c_int64 * 4)(*t.stride()) for t in (query, key, value)),
        (ctypes.c_int64 * 2)(*mask_strides),
        *(query_offset, _DTYPES[query.dtype], torch.get_num_threads()),
        *(scale, softcap),
    )
    _kernel(pattern)(ctypes.byref(arguments))
    return out
