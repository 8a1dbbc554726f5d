"""Antidiagonal estimates on Triton: emit the kernel of a spec, import it, launch it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from types import ModuleType

import torch
from torch import Tensor

from graphopt.codegen.cache import load_python
from graphopt.codegen.triton.attention import on_device, require_runnable
from graphopt.codegen.triton.emit import _Template, _template_text
from graphopt.codegen.triton.interpreter import is_interpreted, repair_bfloat16_dot
from graphopt.codegen.triton.spec import DTYPES
from graphopt.errors import KernelError

BLOCK = 128
"""Tokens of a block, `graphopt.ops.block_kinds.STRIDED_BLOCK`."""

_ROWS = 64


@dataclass(frozen=True)
class StridedSpec:
    """What a kernel's text fixes; lengths and offsets are its arguments."""

    dtype: torch.dtype
    head_dim: int
    group: int
    """Query heads per KV head."""
    stride: int
    has_softcap: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            names = ", ".join(str(dtype) for dtype in DTYPES)
            raise KernelError(f"no Triton selection for {self.dtype}; it takes {names}")

    @property
    def name(self) -> str:
        """Return a name for the emitted file, without its hash."""
        parts = ["antidiagonal", DTYPES[self.dtype], f"d{self.head_dim}"]
        parts += [f"g{self.group}", f"s{self.stride}"]
        return "_".join([*parts, *(["softcap"] if self.has_softcap else [])])

    @property
    def depth(self) -> int:
        """Return the channels of a token that are read at once.

        Operands of full fp32 products lie in registers, so there only a few.
        """
        if self.dtype == torch.float32:
            return 16
        return next(d for d in (64, 32, 16) if self.head_dim % d == 0 or d == 16)

    @property
    def options(self) -> dict[str, int]:
        """Return the options of Triton's compiler."""
        single = self.dtype == torch.float32
        return {"num_warps": 8 if single else 4, "num_stages": 1 if single else 3}


@cache
def emit_strided(spec: StridedSpec) -> str:
    """Return the source of the kernel: one Python file that imports only Triton."""
    single = spec.dtype == torch.float32
    numbers = {
        "HEAD_DIM": spec.head_dim,
        "GROUP": spec.group,
        "STRIDE": spec.stride,
        "BLOCK": BLOCK,
        "SIZE": BLOCK // spec.stride,
        "ROWS": _ROWS,
        "KEYS": 64 if single else 128,
        "DEPTH": spec.depth,
        "PIECES": -(-spec.head_dim // spec.depth),
    }
    words = {name: str(number) for name, number in numbers.items()}
    words["DTYPE"] = DTYPES[spec.dtype]
    words["PRECISION"] = ', input_precision="ieee"' if single else ""
    flags = frozenset({"SOFTCAP" if spec.has_softcap else "NO_SOFTCAP"})
    text = _template_text("select_strided.py.in")
    return _Template(flags, words, (), ()).fill(text)


@cache
def load_strided(spec: StridedSpec) -> ModuleType:
    """Write the kernel's file to the cache directory and import it."""
    if is_interpreted():
        repair_bfloat16_dot()
    return load_python(spec.name, emit_strided(spec))


def masses(
    query: Tensor,
    key: Tensor,
    real: tuple[Tensor, Tensor],
    heads: tuple[int, ...],
    stride: int,
    rows: range,
    query_len: int,
    query_offset: int,
    scale: float,
    softcap: float,
) -> Tensor:
    """Return the mass of blocks of 128, float32 [B, len(heads), len(rows), K].

    ``query`` [B, Hq, n, D], ``key`` [B, Hkv, m, D]: any strides, zero at hidden places;
    ``real``: boolean [B or 1, R * 128] and [B or 1, K * 128], which rows and keys are
    no padding. One launch; blocks that no row sees hold anything. Raises KernelError
    for a device that has no kernel.
    """
    require_runnable(query)
    group = query.shape[1] // key.shape[1]
    spec = StridedSpec(query.dtype, query.shape[-1], group, stride, softcap > 0)
    counted, shown = (_any(own, stride) for own in real)
    shape = (query.shape[0], len(heads), len(rows), real[1].shape[1] // BLOCK)
    mass = query.new_empty(shape, dtype=torch.float32)
    cap = [softcap] if softcap > 0 else []
    with torch.cuda.device_of(query):
        load_strided(spec).launch(
            query, key, shown, counted, on_device(heads, query.device), mass,
            rows.start, query_len, query_offset, scale, *cap, **spec.options,
        )  # fmt: skip
    return mass


def _any(real: Tensor, stride: int) -> Tensor:
    """Return which groups have a real token, int32 [B or 1, n / stride]."""
    return real.unflatten(1, (-1, stride)).any(-1).to(torch.int32)


__all__ = ["BLOCK", "StridedSpec", "emit_strided", "load_strided", "masses"]
