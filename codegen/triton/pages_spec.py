"""What distinguishes one emitted kernel on paged keys and values from another."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from graphopt.codegen.triton.spec import DTYPES
from graphopt.errors import KernelError

KINDS = {torch.int8: "int8", torch.uint8: "int4"}

# The narrowest operand of a tensor-core instruction, in elements.
_NARROWEST = 16


@dataclass(frozen=True)
class PageSpec:
    """What a kernel's text fixes; lengths, budgets and rings are its arguments."""

    dtype: torch.dtype
    """Of queries, new keys and values, and statistics."""
    head_dim: int
    value_dim: int
    kind: str = ""
    """What pages hold: ``int8`` or ``int4`` codes, or floats."""
    has_ring: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            names = ", ".join(str(dtype) for dtype in DTYPES)
            raise KernelError(f"no Triton pages for {self.dtype}; they take {names}")

    @property
    def key_stored(self) -> int:
        """Return the elements of a stored key: two codes of four bits to a byte."""
        return self.head_dim // 2 if self.kind == "int4" else self.head_dim

    @property
    def value_stored(self) -> int:
        """Return the elements of a stored value."""
        return self.value_dim // 2 if self.kind == "int4" else self.value_dim

    @property
    def dims(self) -> str:
        """Return the part of a file's name that tells dtype, dims and codes."""
        parts = [DTYPES[self.dtype], f"d{self.head_dim}"]
        parts[1] += f"v{self.value_dim}" if self.value_dim != self.head_dim else ""
        return "_".join([*parts, *filter(None, (self.kind, "ring" * self.has_ring))])

    def flags(self) -> set[str]:
        """Return which lines of the templates are kept."""
        flags = {self.kind.upper() or "FLOATS", "RING" if self.has_ring else "NO_RING"}
        flags.add("INT4" if self.kind == "int4" else "WHOLE")
        return flags | ({"CODES"} if self.kind else set())

    def words(self) -> dict[str, str]:
        """Return the texts that every template is filled with."""
        return {
            "DTYPE": DTYPES[self.dtype],
            "KIND": self.kind or "floats",
            "HEAD_DIM": str(self.head_dim),
            "VALUE_DIM": str(self.value_dim),
            "KEY_STORED": str(self.key_stored),
            "KEY_WIDTH": str(padded(self.key_stored)),
            "VALUE_STORED": str(self.value_stored),
            "VALUE_WIDTH": str(padded(self.value_stored)),
        }


@dataclass(frozen=True)
class AppendSpec(PageSpec):
    """A kernel that writes new tokens."""

    has_statistics: bool = False
    extremes: bool = True
    """Statistics are the least and greatest key, or the mean and the spread."""

    @property
    def name(self) -> str:
        """Return a name for the emitted file, without its hash."""
        judged = "_judged" if self.extremes else "_spread"
        return f"append_pages_{self.dims}" + judged * self.has_statistics


@dataclass(frozen=True)
class PageAttentionSpec(PageSpec):
    """A kernel that chooses pages and attends to them."""

    group: int = 1
    """Query heads per KV head."""
    has_key_mask: bool = False
    has_softcap: bool = False

    @property
    def name(self) -> str:
        """Return a name for the emitted file, without its hash."""
        own = (("mask", self.has_key_mask), ("softcap", self.has_softcap))
        flags = [flag for flag, on in own if on]
        return "_".join([f"page_attention_{self.dims}_g{self.group}", *flags])


def padded(dim: int) -> int:
    """Return the power of two that holds ``dim`` elements.

    Not `chunks`: what decodes waits for memory, and lanes beyond the head read none.
    """
    return max(1 << (dim - 1).bit_length(), _NARROWEST)
