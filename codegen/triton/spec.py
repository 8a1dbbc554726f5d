"""What distinguishes one emitted attention kernel from another."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from graphopt.codegen.predicates import Predicate, predicate
from graphopt.errors import KernelError

DTYPES = {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32"}

# The pattern of kernels over `graphopt.ops.visit_list`.
VISIT_LIST = "visit-list"

# The narrowest operand of a tensor-core instruction, in elements.
_NARROWEST = 16


@dataclass(frozen=True)
class Chunk:
    """Elements [first, first + width) of a head; ``padded`` ones reach past its end."""

    first: int
    width: int
    padded: bool


@dataclass(frozen=True)
class AttentionSpec:
    """What a kernel's text fixes; lengths, sinks and windows are its arguments."""

    pattern: str
    dtype: torch.dtype
    head_dim: int
    value_dim: int
    group: int
    """Query heads per KV head."""
    has_key_mask: bool = False
    has_softcap: bool = False
    per_head: bool = False
    """Sink and window are int32 tables [Hq] instead of one number each."""
    block: int = 0
    """Tokens of a block where some heads have block lists; 0 where none has."""
    packed: bool = False
    """Prompts of their own lengths lie end to end in one batch row."""

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            names = ", ".join(str(dtype) for dtype in DTYPES)
            raise KernelError(f"no Triton attention for {self.dtype}; it takes {names}")

    @property
    def is_visit(self) -> bool:
        """Tell whether the kernel reads visit lists instead of following a pattern."""
        return self.pattern == VISIT_LIST

    @property
    def predicate(self) -> Predicate:
        """Return the pattern's predicate; of what is visited a row sees the past."""
        return predicate("causal" if self.is_visit else self.pattern)

    @property
    def parameters(self) -> tuple[str, ...]:
        """Return which of ``sink`` and ``window`` the kernel takes."""
        return tuple(str(symbol.name) for symbol in self.predicate.parameters)

    @property
    def name(self) -> str:
        """Return a name for the emitted file, without its hash."""
        dims = f"d{self.head_dim}" + (
            f"v{self.value_dim}" if self.value_dim != self.head_dim else ""
        )
        flags = [
            flag
            for flag, on in (
                ("mask", self.has_key_mask),
                ("softcap", self.has_softcap),
                ("heads", self.per_head),
                (f"blocks{self.block}", self.block),
                ("packed", self.packed),
            )
            if on
        ]
        parts = ["attention", self.pattern.replace("-", "_"), DTYPES[self.dtype], dims]
        return "_".join([*parts, f"g{self.group}", *flags])


def chunks(dim: int) -> tuple[Chunk, ...]:
    """Split a head of ``dim`` elements into one or two powers of two.

    80 is 64 + 16 and 96 is 64 + 32: padding them to 128 would waste up to 60 % of the
    multiplications and of the shared memory.
    """
    first = max(1 << (dim.bit_length() - 1), _NARROWEST)
    rest = dim - first
    if rest <= 0:
        return (Chunk(0, first, rest < 0),)
    second = max(1 << (rest - 1).bit_length(), _NARROWEST)
    if first == second:
        return (Chunk(0, 2 * first, rest < second),)
    return (Chunk(0, first, False), Chunk(first, second, rest < second))
