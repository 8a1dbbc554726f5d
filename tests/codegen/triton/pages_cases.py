"""Steps over a layer of pages with the Triton kernels, checked against the reference.

The interpreter's tests run these in another process and the GPU's tests in this one.
The reference always runs on the CPU: it is compared to the bit, and ATen divides by a
number in another way on a GPU.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import torch

from graphopt.codegen.triton import pages_append, pages_attention
from graphopt.ops.pages import Held, append_reference, page_attention_reference
from tests.ops.pages import CODES, Layer
from tests.oracle import TOLERANCE, assert_close


@dataclass(frozen=True)
class Case:
    """A layer and the calls on it; ``steps`` are tokens appended, one attends."""

    dtype: torch.dtype = torch.float32
    kind: str = ""
    rings: tuple[int, ...] = ()
    dims: tuple[int, int] = (32, 16)
    group: int = 2
    masked: str = "none"
    softcap: float = 0.0
    scale: float | None = None
    budget: int = 4
    interval: int = 3
    layout: str = "dense"
    pages: int = 9
    extremes: bool = True
    steps: tuple[int, ...] = (300, 1, 1, 90, 1)

    def __str__(self) -> str:
        default = Case()
        given = {n: v for n, v in vars(self).items() if v != getattr(default, n)}
        return " ".join(f"{n}={v}" for n, v in given.items()).replace("torch.", "")

    @property
    def seed(self) -> int:
        return zlib.crc32(str(self).encode())

    def layer(self) -> Layer:
        dims = {"dim": self.dims[0], "value_dim": self.dims[1]}
        own = {"kind": self.kind, "rings": self.rings, "dtype": self.dtype}
        return Layer(pages=self.pages, extremes=self.extremes, **own, **dims)


FACTORS: dict[str, Sequence[Any]] = {
    "dtype": tuple(TOLERANCE),
    "kind": tuple(CODES),
    "rings": ((), (1,), (0, 2)),
    # Also heads that are no power of two, and narrower than a product.
    "dims": ((32, 16), (80, 64), (64, 96)),
    "group": (1, 2, 3),
    "masked": ("none", "random", "left"),
    "softcap": (0.0, 5.0),
    "scale": (None, -0.2),
    "budget": (2, 4, 20),
    "interval": (1, 3),
    "layout": ("dense", "turned"),
}

SINGLE = [
    Case(group=17, dims=(16, 8)),
    Case(rings=(0, 1, 2), kind="int8", group=1),  # nothing but rings
    Case(pages=30, steps=(1700, 1), budget=12, masked="random"),
    # More slots of a ring than pages of the table, and a ring that holds all tokens.
    Case(pages=2, rings=(0,), steps=(100, 1), budget=2),
    Case(steps=(1, 1, 70, 200, 64, 1), kind="int4", dtype=torch.float16),
    Case(masked="blind", rings=(1,)),
    Case(extremes=False, kind="int8", dtype=torch.float16, rings=(1,), dims=(80, 64)),
    Case(extremes=False, kind="int4", dtype=torch.bfloat16),
]


@dataclass
class Device:
    """A copy of a layer on a device, and the kernels on it."""

    layer: Layer
    device: str
    tensors: tuple[str, ...] = field(
        default=("full", "ring", "statistics", "selected", "selected_at", "past")
    )

    def __post_init__(self) -> None:
        self.layer = deepcopy(self.layer)
        for name in self.tensors:
            setattr(self.layer, name, self.moved(getattr(self.layer, name)))

    def moved(self, x: Any) -> Any:
        if isinstance(x, tuple):
            return tuple(map(self.moved, x))
        return x.to(self.device) if isinstance(x, torch.Tensor) else x

    def append(self, *inputs: Any) -> None:
        pages_append.launch(*self.moved(inputs))

    def attend(self, query: torch.Tensor, key_mask: Any, case: Case) -> torch.Tensor:
        scale = query.shape[-1] ** -0.5 if case.scale is None else case.scale
        rest = self.moved((key_mask, case.budget, case.interval, scale, case.softcap))
        state = (*Held.of(*self.layer.held()), *self.layer.state())
        return pages_attention.launch(query.to(self.device), *state, *rest)


def check(case: Case, device: str = "cpu") -> None:
    """Append and attend step by step; AssertionError where the reference differs."""
    theirs = case.layer()
    ours = Device(theirs, device)
    mask = mask_of(case)
    for step, new in enumerate(case.steps):
        ours.layer.append(new, ours.append, case.seed + step)
        theirs.append(new, append_reference, case.seed + step)
        equal_pages(ours.layer, theirs, case)
        if new > 1:
            continue
        query = query_of(case, step)
        # Statistics of the interpreter are off by a bit: see `equal_pages`.
        ours.layer.statistics.copy_(theirs.statistics)
        actual = ours.attend(query, mask, case)
        rest = (mask, case.budget, case.interval, case.scale, case.softcap)
        expected = page_attention_reference(
            query, *theirs.held(), *theirs.state(), *rest
        )
        assert torch.equal(ours.layer.selected.cpu(), theirs.selected)
        assert torch.equal(ours.layer.selected_at.cpu(), theirs.selected_at)
        assert_close(actual.cpu(), expected.double(), case.dtype)


def query_of(case: Case, step: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(case.seed + 100 + step)
    shape = (2, 1, 3 * case.group, 2 * case.dims[0])
    query = torch.randn(shape, generator=generator).to(case.dtype).transpose(1, 2)
    if case.layout == "turned":
        return query[..., ::2]
    return query[..., : case.dims[0]].contiguous()


def mask_of(case: Case) -> torch.Tensor | None:
    """A row sees none, some, or all but the first tokens; masks may end early."""
    generator = torch.Generator().manual_seed(case.seed)
    tokens = case.pages * 64 - 100 if case.masked == "random" else case.pages * 64 + 9
    mask = torch.rand(2, tokens, generator=generator) < 0.7
    if case.masked == "left":
        mask[0, :150], mask[0, 150:] = False, True
    if case.masked == "blind":
        mask[1] = False
    if case.layout == "turned":
        mask = mask.t().contiguous().t()
    return None if case.masked == "none" else mask


def equal_pages(ours: Layer, theirs: Layer, case: Case) -> None:
    """Pages, scales and statistics are equal to the bit wherever a token is.

    But Triton's interpreter cuts float32 off to bfloat16 where a GPU rounds.
    """
    pairs = [*zip(ours.full[:4], theirs.full[:4], strict=True)]
    for mine, other in zip(ours.ring[:4], theirs.ring[:4], strict=True):
        if mine is not None:  # the last page of a ring takes what nobody reads
            pairs.append((mine[:, :-1], other[:, :-1]))
    for mine, other in pairs:
        if mine is not None:
            assert_equal(mine.cpu(), other)
    cut = case.kind and case.dtype == torch.bfloat16 and not ours.statistics.is_cuda
    if not case.extremes:  # sums in another order
        limit = TOLERANCE[case.dtype]
        known = theirs.statistics.isfinite()
        pair = (x.statistics.cpu()[known] for x in (ours, theirs))
        torch.testing.assert_close(*pair, rtol=limit, atol=limit)
    elif cut:
        known = theirs.statistics.isfinite()
        pair = (x.statistics[known].float() for x in (ours, theirs))
        torch.testing.assert_close(*pair, rtol=2**-7, atol=0)
    else:
        assert_equal(ours.statistics.cpu(), theirs.statistics)


def assert_equal(actual: torch.Tensor, expected: torch.Tensor) -> None:
    """Equal to the bit, where the reference has a number."""
    if expected.is_floating_point():
        known = expected.isfinite()
        assert torch.equal(actual.isfinite(), known)
        actual, expected = actual[known], expected[known]
    assert torch.equal(actual, expected)
