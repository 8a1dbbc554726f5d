"""Compile the kernels of selection ahead of time for a target, with no device."""

from __future__ import annotations

from functools import cache
from typing import Any

from graphopt.codegen.targets import Target, Tile
from graphopt.codegen.triton.ahead import _POINTERS, Compiled, _read
from graphopt.codegen.triton.interpreter import is_interpreted
from graphopt.codegen.triton.select import CHOICE_OPTIONS, load_choice, load_estimate
from graphopt.codegen.triton.select_blocks import Choice, load_blocks, options
from graphopt.codegen.triton.select_emit import SPAN
from graphopt.codegen.triton.select_spec import CHUNK, EstimateSpec, estimate_tile
from graphopt.codegen.triton.select_strided import StridedSpec, load_strided
from graphopt.errors import KernelError

_TYPES = {
    "mask_ptr": "*u8",
    **dict.fromkeys(("parts_ptr", "rows_ptr", "masses_ptr", "sums_ptr"), "*fp32"),
    **dict.fromkeys(("last_ptr", "tables_ptr", "runs_ptr", "run_count_ptr"), "*i32"),
    **dict.fromkeys(("columns_ptr", "column_count_ptr"), "*i32"),
    **dict.fromkeys(("scale", "cap"), "fp32"),
}
_BLOCK_TYPES = {
    **{"worth_ptr": "*fp32", "shown_ptr": "*i32", "list_ptr": "*i32"},
    **{"runs_ptr": "*i16", "count_ptr": "*i32", "wanted": "fp32"},
}
_UNIT_STRIDES = ("q_stride_d", "k_stride_d", "mask_stride_n", "stride_n")


@cache
def compile_estimate(spec: EstimateSpec, target: Target, name: str) -> Compiled:
    """Compile the kernel ``name`` of an estimate with dense inputs.

    Raises KernelError under TRITON_INTERPRET=1, which leaves nothing to compile.
    """
    tile = estimate_tile(spec)
    if name in ("combine", "last_real"):
        tile = Tile(tile.block_m, tile.block_n, 4, 3)
    constants = {"STEPS": CHUNK // tile.block_n, "BLOCK_N": tile.block_n}
    inputs = dict.fromkeys(("q_ptr", "k_ptr"), _POINTERS[spec.dtype])
    kernel = getattr(load_estimate(spec), name)
    return compile_kernel(kernel, _TYPES | inputs, constants, target, tile)


@cache
def compile_choice(has_key_mask: bool, target: Target) -> Compiled:
    """Compile the choice; raises KernelError as `compile_estimate`."""
    tile = Tile(1, SPAN, CHOICE_OPTIONS["num_warps"], CHOICE_OPTIONS["num_stages"])
    kernel = load_choice(has_key_mask).choose
    return compile_kernel(kernel, _TYPES, {}, target, tile)


@cache
def compile_blocks(choice: Choice, target: Target, width: int) -> Compiled:
    """Compile the choice among ``width`` key blocks of 128, into lists of 64.

    Raises KernelError as `compile_estimate`.
    """
    tile = Tile(1, width, options(width)["num_warps"], 1)
    constants = {"BLOCK": 128, "LIST_BLOCK": 64, "WIDTH": width}
    kernel = load_blocks(choice).choose
    return compile_kernel(kernel, _BLOCK_TYPES, constants, target, tile)


@cache
def compile_strided(spec: StridedSpec, target: Target) -> Compiled:
    """Compile an antidiagonal estimate; raises KernelError as `compile_estimate`."""
    tile = Tile(1, 1, spec.options["num_warps"], spec.options["num_stages"])
    types = dict.fromkeys(("q_ptr", "k_ptr"), _POINTERS[spec.dtype])
    types |= dict.fromkeys(("shown_ptr", "counted_ptr", "heads_ptr"), "*i32")
    types |= {"mass_ptr": "*fp32", "scale": "fp32", "cap": "fp32"}
    return compile_kernel(load_strided(spec).masses, types, {}, target, tile)


def compile_kernel(
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, int],
    target: Target,
    tile: Tile,
) -> Compiled:
    """Compile ``kernel``; arguments that ``types`` does not name are int32.

    Pointers and strides count as multiples of 16, as in a call with dense inputs.
    """
    if is_interpreted():
        raise KernelError("TRITON_INTERPRET=1 is set: unset it to compile kernels")
    import triton
    from triton.compiler import ASTSource

    names = kernel.arg_names
    given = {n: v for n, v in constants.items() if n in names}
    given |= dict.fromkeys((n for n in _UNIT_STRIDES if n in names), 1)
    signature = {n: "constexpr" if n in given else types.get(n, "i32") for n in names}
    aligned = {
        (place,): [["tt.divisibility", 16]]
        for place, n in enumerate(names)
        if n not in given and ("_ptr" in n or "stride_" in n)
    }
    source = ASTSource(kernel, signature, given, aligned)
    binary = triton.compile(source, target=target.triton(), options=tile.options())
    return _read(binary, target, tile)
