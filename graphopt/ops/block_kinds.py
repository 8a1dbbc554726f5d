"""Which block pattern each head has: the per-head tables of ``select_blocks``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from graphopt.ops.block_list import list_heads

_Value = TypeVar("_Value")

STRIDES = (4, 8, 16)
SPARSE_BLOCK, STRIDED_BLOCK = 64, 128


@dataclass(frozen=True)
class Kind:
    """The heads that select alike: ``stride`` 0 is block-sparse, else antidiagonal."""

    stride: int
    blocks: int
    threshold: float
    heads: tuple[int, ...] = ()

    @property
    def block(self) -> int:
        """Return the tokens of the pattern's own blocks, rows and keys alike."""
        return STRIDED_BLOCK if self.stride else SPARSE_BLOCK


def head_kinds(
    blocks: Sequence[int], stride: Sequence[int], threshold: Sequence[float], heads: int
) -> list[Kind]:
    """Return the kinds in the tables, in the order of their first heads.

    Tables hold one value for all heads or one each. A head whose ``blocks`` and
    ``stride`` are 0 has no block pattern.
    """
    rows: dict[Kind, list[int]] = {}
    for head, (count, step, share) in enumerate(
        zip(*(spread(t, heads) for t in (blocks, stride, threshold)), strict=True)
    ):
        if step:
            rows.setdefault(Kind(step, 0, share), []).append(head)
        elif count:
            rows.setdefault(Kind(0, count, 1.0), []).append(head)
    return [
        Kind(k.stride, k.blocks, k.threshold, tuple(found)) for k, found in rows.items()
    ]


def spread(table: Sequence[_Value], heads: int) -> list[_Value]:
    """Return one value a head."""
    return list(table) * heads if len(table) == 1 else list(table)


def kind_lists(kinds: Sequence[Kind], heads: int) -> tuple[int, ...]:
    """Return which list each head uses, -1 for none."""
    owners = {head for kind in kinds for head in kind.heads}
    return list_heads(head in owners for head in range(heads))


def list_block(kinds: Sequence[Kind]) -> int:
    """Return the block that a layer's lists speak of: the smallest of its heads'."""
    return min((kind.block for kind in kinds), default=SPARSE_BLOCK)


def check_tables(
    blocks: Sequence[int],
    stride: Sequence[int],
    threshold: Sequence[float],
    block: int,
    heads: int,
) -> None:
    """Raise ValueError for tables that do not fit ``heads``, one another or a list."""
    for table in (blocks, stride, threshold):
        if len(table) not in (1, heads):
            raise ValueError(
                f"graphopt.select_blocks: a table of {len(table)} values for {heads} "
                "heads"
            )
    if wrong := set(stride) - {0, *STRIDES}:
        raise ValueError(
            f"graphopt.select_blocks: stride {min(wrong)} is not {STRIDES}"
        )
    wanted = list_block(head_kinds(blocks, stride, threshold, heads))
    if block <= 0 or wanted % block:
        raise ValueError(
            f"graphopt.select_blocks: lists in blocks of {block} for heads that select "
            f"in blocks of {wanted}"
        )
