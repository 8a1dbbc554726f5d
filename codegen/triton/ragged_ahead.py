"""Compile the kernels of ragged batches ahead of time, with no device."""

from __future__ import annotations

from functools import cache

from graphopt.codegen.targets import Target
from graphopt.codegen.triton import ragged
from graphopt.codegen.triton.ahead import Compiled
from graphopt.codegen.triton.pages_ahead import _SMALL, _compile
from graphopt.codegen.triton.pages_spec import padded
from graphopt.codegen.triton.ragged_spec import RaggedSpec

KERNELS = ("attend", "merge")


@cache
def compile_ragged(
    spec: RaggedSpec, name: str, target: Target, tokens: int, rows: int
) -> Compiled:
    """Compile one of `KERNELS` for a call of ``tokens`` tokens in ``rows`` rows."""
    tile = ragged.ragged_tile(spec, tokens, rows)
    constants = {"SHORT": padded(spec.stacked), "BLOCK_M": tile.block_m}
    constants |= {"BLOCK_N": tile.block_n} if name == "attend" else {"MERGED": 16}
    tile = tile if name == "attend" else _SMALL
    kernel = getattr(ragged.load(spec), name)
    tables = ("sink", "window") if spec.per_head else ()
    return _compile(kernel, spec, target, tile, constants, tile.options(), tables)
