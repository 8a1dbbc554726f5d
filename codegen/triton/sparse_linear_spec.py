"""What distinguishes one emitted kernel that skips weights from another."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from graphopt.codegen.targets import Tile
from graphopt.codegen.triton.spec import DTYPES
from graphopt.errors import KernelError

_WARPS = 4
_SUMS = {"columns": 64, "neurons": 32}  # float32 registers of a thread


@dataclass(frozen=True)
class SparseSpec:
    """What the text of a kernel fixes; sizes and the threshold are its arguments."""

    kind: str
    """``columns`` (of small inputs) or ``neurons`` (of closed gates) are skipped."""
    dtype: torch.dtype
    rows: int
    has_bias: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            names = ", ".join(str(dtype) for dtype in DTYPES)
            raise KernelError(f"no sparse linear for {self.dtype}; it takes {names}")

    @property
    def name(self) -> str:
        """Return a name for the emitted file, without its hash."""
        bias = "_bias" * self.has_bias
        return f"sparse_{self.kind}_{DTYPES[self.dtype]}_r{self.rows}{bias}"

    @property
    def tile(self) -> Tile:
        """Return how much of a weight a program holds, [skipped, contiguous].

        Sums stay in registers until the end, one for each row and each element of the
        tile. The contiguous side is as long as a row that memory gives at full rate.
        """
        contiguous = 128 if self.kind == "columns" else 256
        sums = _SUMS[self.kind] * 32 * _WARPS
        elements = sums // (1 << (self.rows - 1).bit_length())
        skipped = max(elements // contiguous, 1)
        return Tile(min(skipped, 64), contiguous, _WARPS, 1)
