"""Compile the kernels on pages ahead of time, as `graphopt.codegen.triton.ahead`."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

import triton
from triton.compiler import ASTSource

from graphopt.codegen.targets import Target, Tile
from graphopt.codegen.triton import pages_append, pages_attention
from graphopt.codegen.triton.ahead import _POINTERS, Compiled, _read
from graphopt.codegen.triton.pages_spec import AppendSpec, PageAttentionSpec, PageSpec

KERNELS = ("score", "choose", "attend", "merge")

_WIDTH = 2048  # pages that ``choose`` has: 128K tokens
_SMALL = Tile(0, 0, 4, 3)  # of kernels without products: Triton's own defaults
_CHOOSE = Tile(0, 0, 8, 3)

# What Triton turns into constants in a call with dense inputs.
_UNIT_STRIDES = ("key_stride_d", "value_stride_d", "q_stride_d", "mask_stride_n")
_POOLS = {"": "", "int8": "*i8", "int4": "*u8"}
_FLOATS = ("q_ptr", "key_ptr", "value_ptr", "statistics_ptr", "out_ptr")


@cache
def compile_append(spec: AppendSpec, target: Target) -> Compiled:
    """Compile the kernel that appends, for a call with dense inputs."""
    kernel = pages_append.load(spec).append
    return _compile(kernel, spec, target, _SMALL, {}, pages_append.OPTIONS)


@cache
def compile_page_attention(
    spec: PageAttentionSpec, name: str, target: Target
) -> Compiled:
    """Compile one of `KERNELS`, for dense inputs and 128K tokens of room."""
    tile = pages_attention.attend_tile(spec)
    constants = {
        "score": {"BLOCK": pages_attention.score_block(spec)},
        "choose": {"BLOCK": _WIDTH},
        "attend": {"BLOCK_N": tile.block_n},
        "merge": {"MERGED": 16},
    }[name]
    tile = {"attend": tile, "choose": _CHOOSE}.get(name, _SMALL)
    kernel = getattr(pages_attention.load(spec), name)
    return _compile(kernel, spec, target, tile, constants, tile.options())


def _compile(
    kernel: Any,
    spec: PageSpec,
    target: Target,
    tile: Tile,
    constants: dict[str, int],
    options: dict[str, int],
    tables: Sequence[str] = (),
) -> Compiled:
    names = kernel.arg_names
    constants |= {name: 1 for name in names if name in _UNIT_STRIDES}
    signature = {name: _type(spec, name) for name in names}
    signature |= {name: "*i32" for name in names if name in tables}
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = {
        (index,): [["tt.divisibility", 16]]
        for index, name in enumerate(names)
        if name not in constants and ("_ptr" in name or "_stride_" in name)
    }
    source = ASTSource(kernel, signature, constants, aligned)
    binary = triton.compile(source, target=target.triton(), options=options)
    return _read(binary, target, tile)


def _type(spec: PageSpec, name: str) -> str:
    if name in _FLOATS:
        return _POINTERS[spec.dtype]
    if name.endswith(("keys_ptr", "values_ptr")):
        return _POOLS[spec.kind] or _POINTERS[spec.dtype]
    if name.endswith("_scales_ptr"):
        return "*fp16"
    if name in ("parts_ptr", "sums_ptr"):
        return "*fp32"
    if name == "mask_ptr":
        return "*u8"
    if name.endswith("_ptr"):
        return "*i32"
    return "fp32" if name in ("scale", "cap") else "i32"
