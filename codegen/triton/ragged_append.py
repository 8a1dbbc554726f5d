"""Append ragged batches to pages on Triton."""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from graphopt.codegen.cache import load_python
from graphopt.codegen.pages import LOGICAL
from graphopt.codegen.triton.attention import require_runnable, supports
from graphopt.codegen.triton.pages_append import OPTIONS, require_contiguous
from graphopt.codegen.triton.pages_emit import emit_append_ragged
from graphopt.codegen.triton.pages_spec import KINDS, AppendSpec

BLOCK = LOGICAL  # tokens of a program


@cache
def load(spec: AppendSpec) -> ModuleType:
    """Write the kernel's file to the cache directory and import it."""
    return load_python(f"ragged_{spec.name}", emit_append_ragged(spec))


def launch(
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    past: Tensor,
    table: Tensor,
    *pools: Tensor | None,
) -> None:
    """Run the kernel; shapes and arguments as `graphopt.ops.pages.ragged_append`.

    One launch; its grid depends on shapes alone and nothing is allocated, so that a
    CUDA graph can hold it. What is written is the reference's to the bit. Any strides
    of key and value will do. Raises KernelError for a dtype or a device that has no
    kernel, and for tensors of the cache that are not contiguous.
    """
    require_runnable(key)
    held = [t for t in pools if t is not None]
    require_contiguous([starts, past, table, *held])
    kind = KINDS.get(held[0].dtype, "")
    spec = AppendSpec(key.dtype, key.shape[-1], value.shape[-1], kind)
    if key.numel() == 0 or table.shape[0] == 0:
        return
    with torch.cuda.device_of(key):
        load(spec).launch(key, value, starts, past, table, *held, BLOCK, **OPTIONS)


__all__ = ["BLOCK", "launch", "load", "supports"]
