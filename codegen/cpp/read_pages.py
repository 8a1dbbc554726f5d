"""Build and call the C++ kernel that copies tokens out of their pages."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from graphopt.codegen.cpp.kernel import DTYPES, entry_point, fill, supports
from graphopt.codegen.cpp.pages import PageSetArguments, page_set, pages_text


class _ReadArguments(ctypes.Structure):
    """Mirrors ``struct ReadArguments`` of read_pages.cpp.in."""

    _fields_ = (
        ("set", PageSetArguments),
        *((name, ctypes.c_void_p) for name in ("key", "value", "past", "head")),
        *(
            (name, ctypes.c_int64)
            for name in ("batch", "num_heads", "tokens", "new_tokens")
        ),
        *(
            (name, ctypes.c_int64)
            for name in ("key_dim", "value_dim", "dtype", "threads")
        ),
    )


@cache
def emit() -> str:
    """Return the C++ source of the kernel."""
    return fill("read_pages.cpp.in", {"PAGES": pages_text()})


@cache
def _kernel() -> Any:
    return entry_point("read_pages", emit(), "graphopt_read_pages", _ReadArguments)


@cache
def _heads(heads: tuple[int, ...]) -> Any:
    return (ctypes.c_int32 * len(heads))(*heads)


def launch(
    pages: Any,
    heads: Sequence[int],
    past: Tensor,
    new: int,
    key: Tensor,
    value: Tensor,
) -> None:
    """Copy the tokens of ``heads`` into ``key`` and ``value``, [B, Hkv, S, D].

    ``pages``: a set as `graphopt.ops.pages.held`. Raises KernelError when the kernel
    cannot be built here.
    """
    batch, num_heads, tokens, dim = key.shape
    filled = _ReadArguments(
        page_set(*pages),
        *(key.data_ptr(), value.data_ptr(), past.data_ptr()),
        ctypes.cast(_heads(tuple(heads)), ctypes.c_void_p),
        *(batch, num_heads, tokens, new, dim, value.shape[-1]),
        *(DTYPES[key.dtype], torch.get_num_threads()),
    )
    _kernel()(ctypes.byref(filled))


__all__ = ["emit", "launch", "supports"]
