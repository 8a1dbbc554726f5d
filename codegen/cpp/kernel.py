"""What the C++ attention kernels share: their text, their arguments, their flags."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch

from graphopt.codegen.cache import load_cpp

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class Arguments(ctypes.Structure):
    """Mirrors ``struct Arguments`` of rows.cpp.in, field by field."""

    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "out", "key_mask")),
        *((name, ctypes.c_void_p) for name in ("sink", "window")),
        *(
            (name, ctypes.c_int64)
            for name in ("batch", "num_heads", "num_kv_heads", "query_len", "kv_len")
        ),
        *((name, ctypes.c_int64) for name in ("head_dim", "value_dim")),
        *((f"{x}_strides", ctypes.c_int64 * 4) for x in ("q", "k", "v", "out")),
        ("mask_strides", ctypes.c_int64 * 2),
        *((name, ctypes.c_int64) for name in ("query_offset", "dtype", "threads")),
        *((name, ctypes.c_float) for name in ("scale", "softcap")),
    )


def supports(dtype: torch.dtype) -> bool:
    """Tell whether the kernels take ``dtype``."""
    return dtype in DTYPES


def fill(template: str, parts: Mapping[str, str]) -> str:
    """Return the text of ``template`` with each ``@NAME@`` replaced by its part."""
    text = files("graphopt.codegen.cpp").joinpath(template).read_text()
    for name, value in parts.items():
        text = text.replace(f"@{name}@", value)
    return text


def rows_text(key_block: int, row_block: int) -> str:
    """Return the shared part of a kernel whose tiles have these keys and rows."""
    return fill(
        "rows.cpp.in", {"KEY_BLOCK": str(key_block), "ROW_BLOCK": str(row_block)}
    )


@cache
def flags() -> tuple[str, ...]:
    """Without an exported sgemm (a torch built on another BLAS) use plain loops."""
    library = Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"
    has_sgemm = hasattr(ctypes.CDLL(str(library)), "sgemm_")
    return () if has_sgemm else ("-DGRAPHOPT_OWN_GEMM",)


def entry_point(
    stem: str, text: str, symbol: str, structure: type[ctypes.Structure]
) -> Any:
    """Build ``text`` and return its function ``symbol``, which takes a ``structure``.

    Raises KernelError when the kernel cannot be built here.
    """
    function = getattr(load_cpp(stem, text, flags()), symbol)
    function.restype = None
    function.argtypes = (ctypes.POINTER(structure),)
    return function


def table(values: Sequence[int], heads: int) -> ctypes.Array[ctypes.c_int64]:
    """Return one value a head; a table of one value holds for all."""
    return (ctypes.c_int64 * heads)(*(list(values) * heads)[:heads])


def arguments(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    key_mask: torch.Tensor | None,
    query_offset: int,
    scale: float,
    softcap: float,
) -> Arguments:
    """Return the arguments; tables of sink and window are left null.

    Channels of ``out`` lie side by side.
    """
    batch, heads, rows, dim = query.shape
    mask_strides = (0, 0) if key_mask is None else key_mask.stride()
    return Arguments(
        *(t.data_ptr() for t in (query, key, value, out)),
        None if key_mask is None else key_mask.data_ptr(),
        *(None, None),
        *(batch, heads, key.shape[1], rows, key.shape[2], dim, value.shape[-1]),
        *((ctypes.c_int64 * 4)(*t.stride()) for t in (query, key, value, out)),
        (ctypes.c_int64 * 2)(*mask_strides),
        *(query_offset, DTYPES[query.dtype], torch.get_num_threads()),
        *(scale, softcap),
    )
