"""Calls of the emitted Triton attention kernel, and their check against the oracle.

The interpreter's tests run `check` in another process and the GPU's tests in this one,
so a case is data, and everything random follows from it.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch

from graphopt.codegen.predicates import BLOCK, PATTERNS
from graphopt.codegen.targets import Tile
from graphopt.codegen.triton import attention
from tests.oracle import TOLERANCE, assert_close, oracle, tensors, visible

UNBOUNDED = 2**31 - 1


@dataclass(frozen=True)
class Case:
    """One call; ``offset`` keys lie before the first query, ``extra`` after the last.

    ``tile`` None leaves the choice to the kernel's own table.
    """

    pattern: str = "a-shape"
    dtype: torch.dtype = torch.float32
    dim: int = 64
    value_dim: int | None = None
    group: int = 1
    kv_heads: int = 1
    length: int = 65
    batch: int = 1
    offset: int = 0
    extra: int = 0
    scale: float | None = None
    softcap: float = 0.0
    per_head: bool = False
    key_mask: str = "none"
    layout: str = "dense"
    tile: tuple[int, int] | None = None

    @property
    def keys(self) -> int:
        return max(1, self.length + self.offset + self.extra)

    @property
    def heads(self) -> int:
        return self.group * self.kv_heads

    def __str__(self) -> str:
        default = Case()
        given = {n: v for n, v in vars(self).items() if v != getattr(default, n)}
        return " ".join(f"{n}={v}" for n, v in given.items()).replace("torch.", "")


SINGLE = [
    *(Case(pattern, length=1000, tile=(128, 64)) for pattern in PATTERNS),
    # DeepSeek's latent attention, a head below the narrowest product, a padded one.
    Case(dim=192, value_dim=128, group=2, length=130),
    Case(dim=128, value_dim=40, key_mask="random", layout="gaps"),
    # Of all three inputs, no two have the same strides.
    Case(dim=80, value_dim=64, group=2, batch=2, offset=30, layout="turned"),
    Case(dim=8, dtype=torch.float16, layout="gaps"),
    Case(scale=0.3, softcap=2.0, length=130),
    Case(scale=-0.2, length=130),
    Case(scale=0.0, key_mask="random"),
    Case("causal", batch=3, key_mask="left", length=200),
    Case("a-shape", group=8, per_head=True, length=200, tile=(64, 32)),
    Case("streaming", group=8, per_head=True, length=300, tile=(128, 64)),
    Case("full", length=70, extra=-60, key_mask="left"),
]

FACTORS: dict[str, Sequence[Any]] = {
    "pattern": PATTERNS,
    "dtype": tuple(TOLERANCE),
    # 72 has a chunk with a masked load, 80 and 96 have two whole ones.
    "dim": (64, 72, 80, 96, 128, 256),
    "group": (1, 3, 4, 8),
    "kv_heads": (1, 2),
    "length": (1, 17, 63, 64, 65),
    "batch": (1, 2),
    "offset": (0, 40),
    "extra": (0, 70, -40),
    "softcap": (0.0, 5.0),
    "per_head": (False, True),
    "key_mask": ("none", "random", "left"),
    "layout": ("dense", "turned", "gaps"),
    "tile": (None, (16, 64), (128, 32), (32, 128)),
}


def check(case: Case, device: str = "cpu") -> None:
    """Run the kernel and compare it with the oracle; AssertionError where they differ.

    Rows that see no key have to be zero to the bit.
    """
    q, k, v, key_mask = (t if t is None else t.to(device) for t in _inputs(case))
    sinks, windows = _tables(case)
    tables = zip(sinks, windows, strict=True)
    shape = (case.length, case.keys, case.offset)
    masks = [visible(case.pattern, *pair, *shape) for pair in tables]
    mask = torch.stack(masks).to(device)
    if key_mask is not None:
        mask = mask & key_mask[:, None, None]
    scale = case.dim**-0.5 if case.scale is None else case.scale
    expected = oracle(q, k, v, mask, scale, case.softcap)
    inputs = [t if t is None else _laid_out(t, case) for t in (q, k, v, key_mask)]
    actual = _launch(case, inputs, sinks, windows)
    assert actual.dtype == case.dtype
    assert actual.is_contiguous()
    assert_close(actual, expected, case.dtype)
    blind = ~mask.any(-1).expand(case.batch, case.heads, -1)
    assert not actual[blind].any()


def _launch(
    case: Case, inputs: list[Any], sinks: list[int], windows: list[int]
) -> torch.Tensor:
    rest = (sinks, windows, case.offset, case.scale, case.softcap)
    if case.tile is None:
        return attention.launch(*inputs, case.pattern, *rest)
    tile = Tile(*case.tile, 4, 1)
    with mock.patch.object(attention, "choose_tile", lambda *_: tile):
        return attention.launch(*inputs, case.pattern, *rest)


def _inputs(case: Case) -> tuple[Any, ...]:
    seed = zlib.crc32(str(case).encode())
    sizes = (case.heads, case.kv_heads, case.length, case.keys)
    q, k, v = tensors(*sizes, case.dim, case.dtype, case.batch, seed)
    if case.value_dim:
        v = torch.randn(*v.shape[:-1], case.value_dim).to(case.dtype)
    key_mask = torch.rand(case.batch, case.keys) < 0.7
    if case.key_mask == "left":
        # Padding on the left; the last text of the batch is nothing but padding.
        key_mask = torch.arange(case.keys).expand(case.batch, -1) >= case.keys // 3
        key_mask[-1] &= case.batch == 1
    return q, k, v, None if case.key_mask == "none" else key_mask


def _tables(case: Case) -> tuple[list[int], list[int]]:
    generator = random.Random(str(case))
    unit = BLOCK if case.pattern == "streaming" else 1
    heads = case.heads if case.per_head else 1
    sinks = [generator.choice((0, 5, 64, 200)) for _ in range(heads)]
    windows = [generator.choice((1, 40, 64, 100, UNBOUNDED)) for _ in range(heads)]
    windows = [max(window // unit, 1) * unit for window in windows]
    return [sink // unit * unit for sink in sinks], windows


def _laid_out(tensor: torch.Tensor, case: Case) -> torch.Tensor:
    """Return the same values with other strides; gaps hold what must not be read."""
    if case.layout == "dense":
        return tensor
    if case.layout == "turned":
        return tensor.transpose(0, -2).contiguous().transpose(0, -2)
    *outer, rows, width = tensor.shape
    poison = float("nan") if tensor.is_floating_point() else True
    wide = tensor.new_full((*outer, rows + 3, 2 * width), poison)
    view = wide[..., 1 : rows + 1, ::2]
    view.copy_(tensor)
    return view
