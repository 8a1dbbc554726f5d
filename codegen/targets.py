"""The machines that kernels are emitted for, and the tile sizes that suit each.

Limits: CUDA C++ Programming Guide, technical specifications per compute capability
(opt-in shared memory of a block), and the CDNA3 ISA guide (LDS of a workgroup). Tiles
are starting points: chosen so that shared memory fits and nothing spills (with every
option of a kernel on, a few words outside its loops), then tuned where there is a
device (`graphopt.codegen.triton.tune`).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from graphopt.errors import KernelError, did_you_mean


@dataclass(frozen=True)
class Target:
    """A kind of processor; ``backend`` and ``arch`` are those of Triton's GPUTarget."""

    name: str
    backend: str
    arch: int | str
    warp_size: int
    shared_memory: int
    """Bytes that one thread block can have."""

    @property
    def is_gpu(self) -> bool:
        """Tell whether Triton compiles for it; the CPU has C++ kernels."""
        return self.backend != "cpu"

    def triton(self) -> Any:
        """Return Triton's GPUTarget. Raises KernelError for a CPU."""
        if not self.is_gpu:
            raise KernelError(f"{self.name} is no Triton target; C++ kernels serve it")
        from triton.backends.compiler import GPUTarget

        return GPUTarget(self.backend, self.arch, self.warp_size)


@dataclass(frozen=True)
class Tile:
    """Rows and keys of a tile, warps of a block, and depth of the load pipeline."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int

    def options(self) -> dict[str, int]:
        """Return the options that Triton's compiler takes.

        Fused multiply-adds by name: Triton 3.9 warns that it will stop fusing.
        """
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": True,
        }


TARGETS = {
    target.name: target
    for target in (
        Target("sm_80", "cuda", 80, 32, 163 * 1024),
        Target("sm_90", "cuda", 90, 32, 227 * 1024),
        Target("sm_100", "cuda", 100, 32, 227 * 1024),
        Target("gfx942", "hip", "gfx942", 64, 64 * 1024),
        Target("x86-64", "cpu", "x86-64", 1, 0),
    )
}

# By head dim (the larger of key's and value's), widest last. The first tile of a row is
# used where nothing can be tuned; the others are what tuning tries.
_HALF: dict[str, dict[int, tuple[Tile, ...]]] = {
    "sm_80": {
        64: (Tile(128, 64, 8, 3), Tile(64, 64, 4, 3), Tile(128, 128, 8, 2)),
        128: (Tile(128, 32, 8, 3), Tile(128, 64, 8, 3), Tile(64, 32, 4, 3)),
        256: (Tile(64, 32, 8, 2), Tile(64, 64, 8, 1)),
    },
    "sm_90": {
        64: (Tile(128, 128, 8, 3), Tile(128, 64, 8, 3), Tile(64, 64, 4, 3)),
        128: (Tile(128, 64, 8, 3), Tile(128, 128, 8, 3), Tile(64, 64, 4, 3)),
        256: (Tile(128, 32, 8, 3), Tile(128, 32, 8, 2), Tile(64, 32, 8, 3)),
    },
    "sm_100": {
        64: (Tile(128, 128, 8, 3), Tile(128, 64, 8, 3), Tile(64, 64, 4, 3)),
        96: (Tile(128, 64, 8, 3), Tile(128, 128, 8, 3), Tile(64, 64, 4, 3)),
        128: (Tile(128, 64, 8, 3), Tile(64, 64, 4, 3), Tile(128, 32, 8, 3)),
        256: (Tile(128, 32, 8, 2), Tile(64, 32, 8, 3), Tile(64, 32, 8, 2)),
    },
    "gfx942": {
        64: (Tile(128, 64, 4, 1), Tile(256, 64, 8, 1), Tile(64, 64, 4, 1)),
        128: (Tile(128, 64, 4, 1), Tile(256, 64, 8, 1), Tile(64, 64, 4, 1)),
        256: (Tile(64, 32, 4, 1), Tile(64, 64, 4, 1), Tile(128, 32, 4, 1)),
    },
}

# Full fp32 products run on CUDA's ordinary units, whose operands fill registers.
_SINGLE: dict[str, dict[int, tuple[Tile, ...]]] = {
    "sm_80": {
        64: (Tile(64, 32, 8, 2), Tile(32, 32, 4, 2)),
        128: (Tile(32, 16, 8, 2), Tile(16, 16, 4, 2)),
        256: (Tile(16, 32, 8, 2), Tile(16, 16, 8, 2)),
    },
    "gfx942": {
        64: (Tile(64, 32, 4, 1), Tile(128, 32, 4, 1)),
        128: (Tile(64, 32, 4, 1), Tile(32, 32, 4, 1)),
        256: (Tile(32, 16, 4, 1), Tile(32, 32, 4, 1)),
    },
}
_SINGLE["sm_90"] = _SINGLE["sm_100"] = _SINGLE["sm_80"]

# The interpreter and short queries: no pipeline, small blocks.
INTERPRETER_TILE = Tile(64, 64, 4, 1)
_SHORT_ROWS = 16


def target(name: str) -> Target:
    """Return the target called ``name``; KernelError names the known ones."""
    if name not in TARGETS:
        raise KernelError(f"unknown target '{name}'{did_you_mean(name, TARGETS)}")
    return TARGETS[name]


def tiles(
    target: Target, head_dim: int, dtype: torch.dtype, query_len: int = 1 << 20
) -> tuple[Tile, ...]:
    """Return the tiles to try, the default first; shorter blocks for few rows."""
    if not target.is_gpu:
        return (INTERPRETER_TILE,)
    table = (_SINGLE if dtype == torch.float32 else _HALF)[target.name]
    width = next((w for w in table if head_dim <= w), max(table))
    if query_len > _SHORT_ROWS:
        return table[width]
    short = min(table[width], key=lambda t: t.block_m)
    if short.block_m > _SHORT_ROWS:
        short = Tile(_SHORT_ROWS, short.block_n, 4, short.num_stages)
    return (short,)


@cache
def present(device: torch.device) -> Target:
    """Return the target that ``device`` is, or the nearest older one of its vendor.

    Raises KernelError for a GPU that is older than every target.
    """
    if device.type != "cuda":
        return TARGETS["x86-64"]
    properties: Any = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return _known(properties.gcnArchName.split(":")[0], properties.name)
    capability = 10 * properties.major + properties.minor
    cuda = (t for t in TARGETS.values() if t.backend == "cuda")
    older = [t for t in cuda if int(t.arch) <= capability]
    if not older:
        raise _unsupported(f"{properties.name} (sm_{capability})")
    return max(older, key=lambda t: int(t.arch))


def _known(arch: str, name: str) -> Target:
    if arch not in TARGETS:
        raise _unsupported(f"{name} ({arch})")
    return TARGETS[arch]


def _unsupported(device: str) -> KernelError:
    names = ", ".join(t.name for t in TARGETS.values() if t.is_gpu)
    return KernelError(f"no Triton kernels for {device}; supported: {names} and newer")
