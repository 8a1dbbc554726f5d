"""Compile the kernels that skip weights ahead of time, with no device."""

from __future__ import annotations

from functools import cache

from graphopt.codegen.targets import Target, Tile
from graphopt.codegen.triton import sparse_linear
from graphopt.codegen.triton.ahead import _POINTERS, Compiled, _read
from graphopt.codegen.triton.sparse_linear_spec import SparseSpec

KERNELS = {"columns": ("columns", "merge"), "neurons": ("neurons",)}

_MERGE = Tile(16, 128, 4, 3)
_MULTIPLES = ("width", "outputs", "weight_stride")  # of 16, in most models
_FLOATS = ("threshold_ptr", "parts_ptr")


@cache
def compile_sparse(spec: SparseSpec, name: str, target: Target) -> Compiled:
    """Compile one of `KERNELS` of a spec, for sizes that are multiples of 16."""
    import triton
    from triton.compiler import ASTSource

    kernel = getattr(sparse_linear.load(spec), name)
    tile = _MERGE if name == "merge" else spec.tile
    constants = dict(zip(_blocks(name), (tile.block_m, tile.block_n), strict=True))
    names = kernel.arg_names
    signature = {name: _type(spec, name) for name in names}
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if "_ptr" in name or name in _MULTIPLES
    }
    source = ASTSource(kernel, signature, constants, aligned)
    binary = triton.compile(source, target=target.triton(), options=tile.options())
    return _read(binary, target, tile)


def _blocks(name: str) -> tuple[str, str]:
    return {
        "columns": ("BLOCK_K", "BLOCK_N"),
        "merge": ("MERGED", "BLOCK_N"),
        "neurons": ("BLOCK_F", "BLOCK_K"),
    }[name]


def _type(spec: SparseSpec, name: str) -> str:
    if name in _FLOATS:
        return "*fp32"
    return _POINTERS[spec.dtype] if name.endswith("_ptr") else "i32"
