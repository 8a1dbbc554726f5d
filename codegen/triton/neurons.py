"""Neurons on Triton: emit the kernels that count and gather, import, launch them."""

from __future__ import annotations

from functools import cache
from types import ModuleType

from torch import Tensor, cuda

from graphopt.codegen.cache import load_python
from graphopt.codegen.neurons import PARTS
from graphopt.codegen.triton.attention import require_runnable
from graphopt.codegen.triton.emit import _Template, _template_text
from graphopt.codegen.triton.spec import DTYPES

BLOCK = 4096
"""Neurons that a program reads at once; it reads them again for every bit."""
COUNT_OPTIONS = {"num_warps": 8, "num_stages": 1}
GATHER_OPTIONS = {"num_warps": 4, "num_stages": 1}


@cache
def emit_neurons() -> str:
    """Return the source of the kernels: one Python file that imports only Triton."""
    words = {"PARTS": str(PARTS)}
    text = _template_text("neurons.py.in")
    return _Template(frozenset(), words, (), ()).fill(text)


@cache
def load_neurons() -> ModuleType:
    """Write the kernels' file to the cache directory and import it."""
    return load_python("neurons", emit_neurons())


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

    As `graphopt.ops.neurons.count`, in one launch whose grid depends on shapes alone.
    Raises KernelError for a device that has no kernel.
    """
    require_runnable(inner)
    if inner.numel() == 0:
        return
    real = None if mask is None else mask.contiguous()
    with cuda.device_of(inner):
        load_neurons().launch_count(
            inner.contiguous(), real, counts, parts, absolute, weight,
            block_of(inner.shape[-1]), **COUNT_OPTIONS,
        )  # fmt: skip


def block_of(neurons: int) -> int:
    """Return the neurons that a program reads at once, a power of two."""
    return min(BLOCK, max(1 << (neurons - 1).bit_length(), 256))


def gathers(weight: Tensor, buffer: Tensor) -> bool:
    """Tell whether the kernel copies between tensors like these."""
    alike = weight.dtype == buffer.dtype and weight.dtype in DTYPES
    return alike and weight.is_contiguous() and buffer.is_contiguous()


def gather(weight: Tensor, places: Tensor, buffer: Tensor, dim: int) -> None:
    """Copy what lies at ``places`` int64 [R, P] along ``dim`` of the weight.

    Raises KernelError for a device that has no kernel.
    """
    require_runnable(weight)
    with cuda.device_of(weight):
        load_neurons().launch_gather(
            weight, places.contiguous(), buffer, dim, *blocks(weight, dim),
            **GATHER_OPTIONS,
        )  # fmt: skip


def blocks(weight: Tensor, dim: int) -> tuple[int, int]:
    """Return the tile: its longer side is the one that lies side by side."""
    if weight.ndim == 1:
        return 1024, 1
    return (128, 8) if dim == 1 else (8, 128)


__all__ = ["count", "counts", "emit_neurons", "gather", "gathers", "load_neurons"]
