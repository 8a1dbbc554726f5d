"""Calls of the emitted selection kernels, and their check against the reference.

A case is data, and everything random follows from it: `check` runs in the interpreter's
process and, on a GPU, in this one.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from graphopt.codegen.triton import select
from graphopt.ops.estimate import last_queries_mass
from graphopt.ops.selection import _capacities, select_reference
from tests.codegen.triton.pairwise import pairwise
from tests.oracle import TOLERANCE, tensors

# sink, window, vertical, slash; the last one keeps more than there is.
TABLES = (
    ([4], [16], [20], [12]),
    ([0], [0], [7], [0]),
    ([0], [0], [0], [9]),
    ([3, 0, 90, 0], [20, 0, 1, 90], [10, 0, 5000, 40], [12, 0, 3, 300]),
    ([3000], [2**40], [5000], [6000]),
)


@dataclass(frozen=True)
class Case:
    """One call; ``past`` keys lie before the first query."""

    dtype: torch.dtype = torch.float32
    dim: int = 64
    group: int = 1
    kv_heads: int = 1
    queries: int = 65
    past: int = 0
    batch: int = 1
    softcap: float = 0.0
    key_mask: str = "none"
    tables: int = 0
    turned: bool = False

    @property
    def keys(self) -> int:
        return self.queries + self.past

    @property
    def heads(self) -> int:
        return self.group * self.kv_heads

    def __str__(self) -> str:
        default = Case()
        given = {n: v for n, v in vars(self).items() if v != getattr(default, n)}
        return " ".join(f"{n}={v}" for n, v in given.items()).replace("torch.", "")


SINGLE = [
    Case(queries=2000, past=100, key_mask="right", batch=2),
    Case(queries=1100, past=1000, dtype=torch.bfloat16, dim=128, tables=4),
    Case(queries=1, key_mask="nothing"),
    Case(queries=1024, dim=16, group=2),
]

FACTORS: dict[str, Sequence[Any]] = {
    "dtype": tuple(TOLERANCE),
    "dim": (64, 72, 96, 256),
    "group": (1, 4),
    "kv_heads": (1, 2),
    "queries": (1, 17, 64, 65),
    "past": (0, 40, 500),
    "batch": (1, 2),
    "softcap": (0.0, 5.0),
    "key_mask": ("none", "left", "right", "holes", "nothing"),
    "tables": tuple(range(len(TABLES))),
    "turned": (False, True),
}


def cases() -> list[Case]:
    return SINGLE + [Case(**chosen) for chosen in pairwise(FACTORS)]


def inputs(case: Case, device: str) -> tuple[Any, ...]:
    """Return random query, key and key mask."""
    seed = zlib.crc32(str(case).encode())
    sizes = (case.heads, case.kv_heads, case.queries, case.keys, case.dim)
    q, k, _ = tensors(*sizes, case.dtype, case.batch, seed)
    place = torch.arange(case.keys).expand(case.batch, -1)
    row = torch.arange(case.batch)[:, None]
    key_mask = {
        "none": None,
        "left": place >= case.keys // 3 * (1 - row),
        "right": place < case.keys - case.keys // 2 * row,
        "holes": torch.rand(case.batch, case.keys) < 0.7,
        "nothing": (place >= 0) & (row > 0),
    }[case.key_mask]
    if case.turned:
        q, k = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k))
    return tuple(t if t is None else t.to(device) for t in (2 * q, k, key_mask))


def tables_of(case: Case) -> tuple[list[int], ...]:
    """Return the tables, each of one value or one a head."""
    given = TABLES[case.tables]
    if len(given[0]) == 1:
        return given
    return tuple((table * case.heads)[: case.heads] for table in given)


def check(case: Case, device: str = "cpu") -> int:
    """Compare the kernels' lists with the reference's; return the heads compared.

    A head whose least mass that is kept is the next one but for rounding may keep that.
    """
    q, k, key_mask = inputs(case, device)
    tables, rest = tables_of(case), (case.past, case.dim**-0.5, case.softcap)
    sizes = _capacities(tables[0], tables[2], tables[3])
    found = select.launch(q, k, key_mask, tables, sizes, *rest)
    wanted = select_reference(q, k, key_mask, *tables, *rest)
    columns, distances = last_queries_mass(q, k, key_mask, *rest)
    is_clear = _is_clear(distances, tables[1], tables[3])
    clear = [is_clear] * 2 + [_is_clear(columns, tables[0], tables[2])] * 2
    for own, other, heads in zip(found, wanted, clear, strict=True):
        assert own.dtype == torch.int32 and own.shape == other.shape
        assert torch.equal(own[heads], other[heads])
    return int(sum(heads.sum() for heads in clear[1:3]))


def _is_clear(
    mass: torch.Tensor, first: Sequence[int], count: Sequence[int]
) -> torch.Tensor:
    """Tell whose choice hangs on no rounding, [B, Hq].

    Nor on whether an exponential is so small that it is zero.
    """
    clear = torch.ones(mass.shape[:2], dtype=torch.bool, device=mass.device)
    for head in range(mass.shape[1]):
        begin, most = (t[head % len(t)] for t in (first, count))
        rest = mass[:, head, min(begin, mass.shape[2]) :]
        order = rest.sort(-1, descending=True).values
        clear[:, head] = ~((order > 0) & (order < 1e-30)).any(-1)
        if 0 < most < order.shape[-1]:
            least, next_ = order[:, most - 1], order[:, most]
            clear[:, head] &= (next_ == 0) | (least - next_ > 1e-4 * least)
    return clear
