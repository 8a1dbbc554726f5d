"""What distinguishes one emitted kernel of an int8 linear from another, and its tiles.

Tiles are starting points, the first is used where nothing can be tuned
(`graphopt.codegen.triton.int8_tune`): chosen so that shared memory fits and nothing
spills.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from graphopt.codegen.targets import INTERPRETER_TILE, Target, Tile
from graphopt.codegen.triton.spec import DTYPES
from graphopt.errors import KernelError

LIST_ROWS = 128
"""Rows that share a list of outlier channels; every tile's rows divide it."""
MOST_ROWS = 16
"""Rows up to which the kernel over float activations serves."""
_VECTOR_ROWS = 2
_THREADS = 128
_MOST_SINGLE = 128 * 128  # of a tile with a float32 shadow

# [rows, outputs] by the most rows of a call that they suit.
_PRODUCT: dict[str, dict[int, tuple[Tile, ...]]] = {
    "cuda": {
        16: (Tile(16, 32, 4, 5), Tile(16, 64, 4, 4), Tile(16, 128, 4, 3)),
        64: (Tile(64, 64, 4, 4), Tile(32, 64, 4, 4), Tile(64, 128, 4, 4)),
        1 << 62: (Tile(128, 128, 8, 4), Tile(128, 256, 8, 3), Tile(64, 128, 4, 4)),
    },
    "hip": {
        16: (Tile(16, 32, 4, 2), Tile(16, 64, 4, 2), Tile(16, 128, 4, 2)),
        64: (Tile(64, 64, 4, 2), Tile(32, 64, 4, 2)),
        1 << 62: (Tile(128, 128, 8, 2), Tile(128, 128, 4, 2), Tile(64, 128, 4, 2)),
    },
}


def _require(dtype: torch.dtype) -> None:
    if dtype not in DTYPES:
        names = ", ".join(str(dtype) for dtype in DTYPES)
        raise KernelError(f"no int8 linear for {dtype}; it takes {names}")


@dataclass(frozen=True)
class ProductSpec:
    """A product of codes by codes; ``dtype`` is that of the activations and the result.

    ``by_token``: each row has a scale of its own, where else one serves all rows.
    """

    dtype: torch.dtype
    has_shadow: bool = False
    by_token: bool = False
    has_bias: bool = False

    def __post_init__(self) -> None:
        _require(self.dtype)

    @property
    def name(self) -> str:
        """Return a name for the emitted file, without its hash."""
        kind = "_token" * self.by_token + "_shadow" * self.has_shadow
        return f"int8_product_{DTYPES[self.dtype]}{kind}" + "_bias" * self.has_bias

    def tiles(self, target: Target, rows: int) -> tuple[Tile, ...]:
        """Return the tiles to try for a call of ``rows`` rows, the default first."""
        if not target.is_gpu:
            return (INTERPRETER_TILE,)
        table = _PRODUCT[target.backend]
        found = table[next(most for most in table if rows <= most)]
        if self.dtype != torch.float32:
            return found
        return tuple(t for t in found if t.block_m * t.block_n <= _MOST_SINGLE)


@dataclass(frozen=True)
class RowsSpec:
    """A product of few float rows by codes; sizes are the kernel's arguments."""

    dtype: torch.dtype
    rows: int
    has_bias: bool = False

    def __post_init__(self) -> None:
        _require(self.dtype)

    @property
    def name(self) -> str:
        """Return a name for the emitted file, without its hash."""
        bias = "_bias" * self.has_bias
        return f"int8_rows_{DTYPES[self.dtype]}_r{self.rows}{bias}"

    @property
    def is_matrix(self) -> bool:
        """Tell whether tensor cores multiply.

        Ordinary units keep up with memory for the first rows only, and nothing else
        makes full float32 products.
        """
        return self.rows > _VECTOR_ROWS and self.dtype != torch.float32

    def tiles(self) -> tuple[Tile, ...]:
        """Return the tiles [outputs, inputs] to try, the default first.

        Without tensor cores sums stay in registers until the end, one for each row and
        each element of the tile. With them the outputs are too few for Hopper's widest
        instructions, which would take the codes from shared memory two at a time.
        """
        if self.is_matrix:
            return Tile(32, 256, 4, 4), Tile(16, 256, 4, 4), Tile(32, 128, 4, 4)
        rows = 1 << (self.rows - 1).bit_length()
        found = []
        for sums in (32, 64):
            elements = sums * _THREADS // rows
            inputs = 512 if elements >= 2048 else 128
            found.append(Tile(max(elements // inputs, 1), inputs, 4, 1))
        return tuple(found)
