"""What distinguishes one emitted kernel of vertical-slash selection from another."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from graphopt.codegen.targets import Tile
from graphopt.codegen.triton.spec import DTYPES
from graphopt.errors import KernelError

ROWS = 64
"""Query rows that are looked at, `graphopt.ops.estimate.LAST_QUERIES`."""

CHUNK = 1024
"""Keys that one program walks over. The sums along diagonals compute a tile more than
their chunk, 6 % of it; statistics of a million keys are 1024 parts a row."""


@dataclass(frozen=True)
class EstimateSpec:
    """What the text of an estimate fixes; lengths and offsets are its arguments."""

    dtype: torch.dtype
    head_dim: int
    group: int
    """Query heads per KV head."""
    has_key_mask: bool = False
    has_softcap: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            names = ", ".join(str(dtype) for dtype in DTYPES)
            raise KernelError(f"no Triton selection for {self.dtype}; it takes {names}")

    @property
    def name(self) -> str:
        """Return a name for the emitted file, without its hash."""
        own = (("mask", self.has_key_mask), ("softcap", self.has_softcap))
        flags = [flag for flag, on in own if on]
        parts = ["estimate", DTYPES[self.dtype], f"d{self.head_dim}", f"g{self.group}"]
        return "_".join([*parts, *flags])


def estimate_tile(spec: EstimateSpec) -> Tile:
    """Return the tile: ROWS rows, and as many keys, since sums of diagonals reach back
    by one tile and no further.

    The widest that spill on no target (tests/codegen/triton/test_select.py).
    """
    # In fp32 a second stage costs registers, which hold the operands.
    if spec.dtype == torch.float32:
        return Tile(ROWS, ROWS, 8, 1)
    return Tile(ROWS, ROWS, 4 if spec.head_dim <= 128 else 8, 2)
