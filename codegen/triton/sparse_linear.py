"""Linears that skip weights on Triton: emit the kernel of a spec, import it, launch it.

Templates are those of `graphopt.codegen.triton.emit`; ``%head|`` repeats a line for
each row, ``%first|`` and ``%rest|`` for the first and the later ones.
"""

from __future__ import annotations

from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from graphopt.codegen.cache import load_python
from graphopt.codegen.triton.attention import require_runnable, supports
from graphopt.codegen.triton.emit import _Template, _template_text
from graphopt.codegen.triton.sparse_linear_spec import SparseSpec
from graphopt.codegen.triton.spec import DTYPES

# Enough for every processor of a large GPU to have several, so that some wait for
# memory while others compute.
_PROGRAMS = 1024


@cache
def emit(spec: SparseSpec) -> str:
    """Return the source of the kernels: one Python file that imports only Triton."""
    flags = frozenset({"BIAS"} if spec.has_bias else ())
    words = {
        "ROWS": str(spec.rows),
        "DTYPE": DTYPES[spec.dtype],
        "PLUS_BIAS": " + bias" if spec.has_bias else "",
    }
    rows = tuple({"i": row, "mask": ""} for row in range(spec.rows))
    text = _template_text(f"sparse_{spec.kind}.py.in")
    return _Template(flags, words, rows, ()).fill(text)


@cache
def load(spec: SparseSpec) -> ModuleType:
    """Write the kernels' file to the cache directory and import it."""
    return load_python(spec.name, emit(spec))


def columns(
    input: Tensor, weight: Tensor, bias: Tensor | None, threshold: Tensor
) -> Tensor:
    """Return input [..., K] times weight [K, N], as `graphopt.ops.sparse_linear`.

    ``input`` is contiguous, as is ``bias``; rows of the weight lie in one piece each.
    Two launches whose grids depend on shapes alone, and no atomic addition. Raises
    KernelError for a dtype or a device that has no kernel.
    """
    require_runnable(input)
    width, outputs = weight.shape
    out = input.new_empty((*input.shape[:-1], outputs))
    if out.numel() == 0:
        return out
    spec = SparseSpec("columns", input.dtype, input.numel() // width, bias is not None)
    operands = [t for t in (input, weight, bias, threshold, out) if t is not None]
    tile = spec.tile
    with torch.cuda.device_of(input):
        load(spec).launch(
            *operands,
            *splits(spec, width, outputs),
            tile.block_m,
            tile.block_n,
            **tile.options(),
        )
    return out


def neurons(
    input: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, threshold: Tensor
) -> Tensor:
    """Return gate times up, [..., N]; weight [N, K], as `graphopt.ops.sparse_up`.

    Operands as for `columns`; gate [..., N] is contiguous. One launch.
    """
    require_runnable(input)
    out = torch.empty_like(gate)
    if out.numel() == 0:
        return out
    rows = gate.numel() // gate.shape[-1]
    spec = SparseSpec("neurons", input.dtype, rows, bias is not None)
    given = (input, weight, bias, gate, threshold, out)
    tile = spec.tile
    with torch.cuda.device_of(input):
        load(spec).launch(
            *(t for t in given if t is not None),
            tile.block_m,
            tile.block_n,
            **tile.options(),
        )
    return out


def splits(spec: SparseSpec, width: int, outputs: int) -> tuple[int, int]:
    """Return the splits of the inputs, and the blocks of inputs that each has."""
    blocks = -(-width // spec.tile.block_m)
    across = -(-outputs // spec.tile.block_n)
    steps = -(-blocks // max(1, min(blocks, _PROGRAMS // across)))
    return -(-blocks // steps), steps


__all__ = ["columns", "emit", "load", "neurons", "splits", "supports"]
