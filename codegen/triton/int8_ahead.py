"""Compile the kernels of int8 linears ahead of time, with no device."""

from __future__ import annotations

from functools import cache
from typing import Any

from graphopt.codegen.targets import Target, Tile
from graphopt.codegen.triton.ahead import _POINTERS, Compiled, _read
from graphopt.codegen.triton.int8 import load
from graphopt.codegen.triton.int8_spec import ProductSpec, RowsSpec
from graphopt.codegen.triton.interpreter import is_interpreted
from graphopt.errors import KernelError

_TYPES = {
    **dict.fromkeys(("scales_ptr", "settings_ptr", "parts_ptr"), "*fp32"),
    **dict.fromkeys(("channels_ptr", "counts_ptr"), "*i32"),
    **{"weight_ptr": "*i8", "marks_ptr": "*i8"},
}
_BLOCKS = {
    "product": ("BLOCK_M", "BLOCK_N"),
    "sums": ("BLOCK_N", "BLOCK_K"),
    "merge": ("MERGED", "BLOCK_N"),
    "mark": ("", "BLOCK"),
    "collect": ("", "BLOCK"),
}
_FIXED = {
    "merge": Tile(16, 128, 4, 3),
    "mark": Tile(0, 64, 4, 3),
    "collect": Tile(0, 2048, 8, 3),
}
_MULTIPLES = ("width", "outputs", "x_stride", "float_stride_n")  # of 16, mostly


@cache
def compile_int8(
    spec: ProductSpec | RowsSpec, name: str, target: Target, tile: Tile
) -> Compiled:
    """Compile the kernel ``name`` of a spec for sizes that are multiples of 16.

    ``tile`` counts for ``product`` and ``sums``, which is compiled without splits.
    Raises KernelError under TRITON_INTERPRET=1, which leaves nothing to compile.
    """
    if is_interpreted():
        raise KernelError("TRITON_INTERPRET=1 is set: unset it to compile kernels")
    import triton
    from triton.compiler import ASTSource

    kernel, tile = getattr(load(spec), name), _FIXED.get(name, tile)
    pairs = zip(_BLOCKS[name], (tile.block_m, tile.block_n), strict=True)
    constants: dict[str, Any] = {block: size for block, size in pairs if block}
    constants |= {"HAS_SPLITS": False} if name == "sums" else {}
    constants |= {"float_stride_k": 1} if "float_stride_k" in kernel.arg_names else {}
    signature = {name: _type(spec, name) for name in kernel.arg_names}
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, name in enumerate(kernel.arg_names)
        if "_ptr" in name or name in _MULTIPLES
    }
    source = ASTSource(kernel, signature, constants, aligned)
    binary = triton.compile(source, target=target.triton(), options=tile.options())
    return _read(binary, target, tile)


def _type(spec: ProductSpec | RowsSpec, name: str) -> str:
    if name == "codes_ptr":
        return "*u8" if isinstance(spec, ProductSpec) else "*i8"
    if name in _TYPES:
        return _TYPES[name]
    return _POINTERS[spec.dtype] if name.endswith("_ptr") else "i32"
