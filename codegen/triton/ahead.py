"""Compile a kernel ahead of time for a target, with no device, and read what came out.

Triton fills ``n_spills`` and ``n_regs`` only when a driver loads the binary, so they
are read from the binary itself: the resource table of a cubin through cuobjdump, the
kernel descriptor in AMD code. Both state the bytes of private memory of a thread, which
is what drivers report as local memory; these kernels have no arrays in it, so every
byte is a spilled register.
"""

from __future__ import annotations

import re
import subprocess
import tempfile
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch

from graphopt.codegen.targets import Target, Tile, tiles
from graphopt.codegen.triton.attention import load
from graphopt.codegen.triton.interpreter import is_interpreted
from graphopt.codegen.triton.spec import AttentionSpec
from graphopt.codegen.triton.visit import visit_tile
from graphopt.errors import KernelError

_POINTERS = {torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.float32: "*fp32"}

_LISTS = {
    **dict.fromkeys(("starts_ptr", "lengths_ptr"), "*i32"),
    **dict.fromkeys(("runs_ptr", "run_count_ptr", "columns_ptr"), "*i32"),
    **dict.fromkeys(("column_count_ptr", "key_block_count_ptr"), "*i32"),
    **{"block_heads_ptr": "*i32", "key_blocks_ptr": "*i16"},
}
_RUN_STEPS = 13  # for up to 8191 runs a head

# What Triton turns into constants in a call with dense inputs.
_UNIT_STRIDES = ("q_stride_d", "k_stride_d", "v_stride_d", "mask_stride_n")


@dataclass(frozen=True)
class Compiled:
    """What one kernel costs on one target."""

    target: Target
    tile: Tile
    shared_memory: int
    """Bytes of a thread block."""
    registers: int
    """32-bit registers of a thread (vector registers on AMD)."""
    spills: int
    """Bytes of spilled registers of a thread."""
    has_wgmma: bool
    """Uses Hopper's warp-group matrix instructions."""
    assembly: str = field(repr=False)
    """PTX or AMD GCN text."""


@cache
def compile_ahead(
    spec: AttentionSpec, target: Target, tile: Tile | None = None
) -> Compiled:
    """Compile ``spec`` for ``target`` with ``tile``, or with the table's first.

    Raises KernelError under TRITON_INTERPRET=1, which leaves nothing to compile.
    """
    if is_interpreted():
        raise KernelError("TRITON_INTERPRET=1 is set: unset it to compile kernels")
    import triton
    from triton.compiler import ASTSource

    width = max(spec.head_dim, spec.value_dim)
    first = visit_tile(spec) if spec.is_visit else tiles(target, width, spec.dtype)[0]
    tile = tile or first
    kernel = load(spec).attention
    signature, constants, attributes = _signature(spec, kernel.arg_names, tile)
    source = ASTSource(kernel, signature, constants, attributes)
    binary = triton.compile(source, target=target.triton(), options=tile.options())
    return _read(binary, target, tile)


def _signature(spec: AttentionSpec, names: list[str], tile: Tile) -> tuple[Any, ...]:
    """Return types, constants and alignment, as a dense call would specialise them."""
    constants = {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n}
    constants |= dict.fromkeys(_UNIT_STRIDES[: 4 if spec.has_key_mask else 3], 1)
    constants |= {"RUN_STEPS": _RUN_STEPS} if spec.is_visit else {}
    signature = {name: _type(spec, name) for name in names}
    signature |= dict.fromkeys(constants, "constexpr")
    aligned = [
        (index,)
        for index, name in enumerate(names)
        if name not in constants and ("_ptr" in name or "_stride_" in name)
    ]
    return signature, constants, {i: [["tt.divisibility", 16]] for i in aligned}


def _type(spec: AttentionSpec, name: str) -> str:
    if name == "mask_ptr":
        return "*u8"
    if name in _LISTS:
        return _LISTS[name]
    if name == "dense_rows" and spec.per_head:
        return "*i32"
    if name.endswith("_ptr"):
        return _POINTERS[spec.dtype]
    if name in ("sink", "window"):
        return "*i32" if spec.per_head else "i32"
    return "fp32" if name in ("scale", "cap") else "i32"


def _read(binary: Any, target: Target, tile: Tile) -> Compiled:
    if target.backend == "cuda":
        assembly = binary.asm["ptx"]
        registers, spills = _cubin_resources(binary.asm["cubin"])
    else:
        assembly = binary.asm["amdgcn"]
        registers = _field(r"\.vgpr_count: +(\d+)", assembly)
        spills = _field(r"\.private_segment_fixed_size: +(\d+)", assembly)
    return Compiled(
        target,
        tile,
        shared_memory=int(binary.metadata.shared),
        registers=registers,
        spills=spills,
        has_wgmma="wgmma.mma_async" in assembly,
        assembly=assembly,
    )


def _cubin_resources(cubin: bytes) -> tuple[int, int]:
    """Return (registers, bytes of frame) per thread."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "kernel.cubin")
        path.write_bytes(cubin)
        command = [knobs.nvidia.cuobjdump.path, "--dump-resource-usage", str(path)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise KernelError(f"cuobjdump cannot read the kernel: {done.stderr.strip()}")
    frame = _field(r"STACK:(\d+)", done.stdout) + _field(r"LOCAL:(\d+)", done.stdout)
    return _field(r"REG:(\d+)", done.stdout), frame


def _field(pattern: str, text: str) -> int:
    """Return the sum of a number's occurrences; KernelError when there is none."""
    found = re.findall(pattern, text)
    if not found:
        raise KernelError(f"the compiled kernel does not state {pattern}")
    return sum(map(int, found))
