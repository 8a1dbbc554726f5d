"""Calls of the Triton kernel over packed prompts, checked against the reference."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from unittest import mock

import torch

from graphopt.codegen.targets import Tile
from graphopt.codegen.triton import attention, packed
from graphopt.ops.packed import launched, packed_reference
from graphopt.ops.tokens import pack_prompts, take_packed
from tests.oracle import assert_close, tensors

LENGTHS, TOKENS = (1, 40, 23), 40


@dataclass(frozen=True)
class PackedCase:
    """Three prompts of 1, 40 and 23 tokens, the second with a hole if ``masked``."""

    pattern: str
    window: int = 0
    softcap: float = 0.0
    dtype: torch.dtype = torch.float32
    masked: bool = False
    tile: tuple[int, int] | None = None


def check_packed(case: PackedCase, device: str = "cpu") -> None:
    """Run the kernel; AssertionError where it differs from the reference."""
    mask = torch.arange(TOKENS) >= TOKENS - torch.tensor(LENGTHS)[:, None]
    mask[1, 10:14] = not case.masked
    places, *where = (x.to(device) for x in pack_prompts(mask))
    q, k, v = (x.to(device) for x in tensors(4, 2, TOKENS, TOKENS, 16, case.dtype, 3))
    inputs = [take_packed(x, places, 2) for x in (q, k, v)]
    shown = take_packed(mask.to(device), places, 1) if case.masked else None
    rest = (*where, shown, case.pattern, [0], [case.window], 0.3, case.softcap)
    tile = Tile(*(case.tile or (16, 16)), 4, 1)
    chosen = mock.patch.object(attention, "choose_tile", lambda *_: tile)
    with chosen if case.tile else nullcontext():
        actual = launched(packed.launch, *inputs, *rest)
    expected = packed_reference(*(x.double() for x in inputs), *rest)
    assert actual.dtype == case.dtype
    assert_close(actual, expected, case.dtype)
