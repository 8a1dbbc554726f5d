"""Append to pages on Triton: emit the kernel of a spec, import it, launch it."""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from graphopt.codegen.cache import load_python
from graphopt.codegen.triton.attention import require_runnable, supports
from graphopt.codegen.triton.pages_emit import emit_append
from graphopt.codegen.triton.pages_spec import KINDS, AppendSpec
from graphopt.errors import KernelError

# A multiplication that is fused with the addition behind it gives other statistics
# than the reference; nothing here is short of arithmetic.
OPTIONS = {"num_warps": 4, "num_stages": 1, "enable_fp_fusion": False}


@cache
def load(spec: AppendSpec) -> ModuleType:
    """Write the kernel's file to the cache directory and import it."""
    return load_python(spec.name, emit_append(spec))


def launch(
    key: Tensor,
    value: Tensor,
    past: Tensor,
    table: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
    statistics: Tensor | None,
    sink_pages: int = 0,
    ring_pages: int = 0,
    extremes: bool = True,
) -> None:
    """Run the kernel; shapes and arguments as `graphopt.ops.pages.append`.

    One launch for all rows, heads and tokens. Its grid depends on shapes alone and
    nothing is allocated, so that a CUDA graph can hold it. What is written is the
    reference's to the bit, but for the rounding of means; tokens that a ring does not
    keep are written nowhere. Any strides of key and value will do. Raises KernelError
    for a dtype or a device that has no kernel, and for tensors of the cache that are
    not contiguous.
    """
    require_runnable(key)
    held = [key_pages, value_pages, key_scales, value_scales, statistics]
    given = [t for t in (past, table, *held) if t is not None]
    require_contiguous(given)
    spec = AppendSpec(
        key.dtype,
        key.shape[-1],
        value.shape[-1],
        KINDS.get(key_pages.dtype, ""),
        ring_pages > 0,
        statistics is not None,
        extremes,
    )
    if key.numel() == 0:
        return
    ring = [sink_pages, ring_pages] if ring_pages else []
    with torch.cuda.device_of(key):
        load(spec).launch(key, value, *given, *ring, **OPTIONS)


def require_contiguous(tensors: list[Tensor]) -> None:
    """Raise KernelError unless the kernels' arithmetic finds what is in ``tensors``."""
    for tensor in tensors:
        if not tensor.is_contiguous():
            raise KernelError(
                f"pages: the cache has a tensor of shape {list(tensor.shape)} and "
                f"strides {tensor.stride()}; the kernels take contiguous ones"
            )


__all__ = ["OPTIONS", "launch", "load", "require_contiguous", "supports"]
