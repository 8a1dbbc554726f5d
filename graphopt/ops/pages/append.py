"""``graphopt::append_pages``: write new keys and values into pages, in place.

Shapes: key [B, H, S, D], value [B, H, S, Dv]; ``past`` int32 [B], the tokens that each
batch row holds already; table, pools, scales and statistics as in
`graphopt.ops.pages.layout`, H heads each. Quantised pools have scales, pools that
pages are selected from have statistics: the smallest and largest key of every `LOGICAL`
tokens (``extremes``), or their mean less and plus `SPREAD` standard deviations.
``ring_pages`` of 0 means no ring. Nothing waits for the device, and no tensor moves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from graphopt.codegen.pages import SPREAD
from graphopt.ops.pages.layout import LOGICAL, PAGE, decode, encode, pages_of, places

_library = torch.library.Library("graphopt", "FRAGMENT")
_library.define(
    "append_pages(Tensor key, Tensor value, Tensor past, Tensor table, "
    "Tensor(a!) key_pages, Tensor(b!) value_pages, Tensor(c!)? key_scales, "
    "Tensor(d!)? value_scales, Tensor(e!)? statistics, int sink_pages=0, "
    "int ring_pages=0, bool extremes=True) -> ()"
)


@torch.library.register_fake("graphopt::append_pages", lib=_library)
def _fake(*inputs: Any) -> None:
    return None


def append_reference(
    key: Tensor,
    value: Tensor,
    past: Tensor,
    table: Tensor,
    key_pages: Tensor,
    value_pages: Tensor,
    key_scales: Tensor | None,
    value_scales: Tensor | None,
    statistics: Tensor | None,
    sink_pages: int = 0,
    ring_pages: int = 0,
    extremes: bool = True,
) -> None:
    """Append in plain ATen, on any device; arguments as in the module."""
    new, pages = key.shape[2], key_pages.shape[1]
    page, slot = places(past, new, table, pages, sink_pages, ring_pages)
    store(key, key_pages, key_scales, page, slot)
    store(value, value_pages, value_scales, page, slot)
    if statistics is not None:
        judge = least_and_greatest if extremes else mean_and_spread
        _update(statistics, key_pages, key_scales, past, new, table, judge)


def store(
    x: Tensor, pages: Tensor, scales: Tensor | None, page: Tensor, slot: Tensor
) -> None:
    """Write x [B, H, S, D] to ``page`` and ``slot`` [B, S] of a pool."""
    x = x.transpose(0, 1)
    if scales is not None:
        x, new_scales = encode(x, pages)
        scales[:, page, slot] = new_scales.to(scales.dtype)
    pages[:, page, slot] = x.to(pages.dtype)


def _update(
    statistics: Tensor,
    key_pages: Tensor,
    key_scales: Tensor | None,
    past: Tensor,
    new: int,
    table: Tensor,
    judge: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
) -> None:
    """Judge every page again that the new tokens touch; a row may touch one less."""
    total = past + new
    last = (total - 1)[:, None] // PAGE
    touched = past[:, None] // PAGE + torch.arange(
        pages_of(new + PAGE - 1), device=past.device
    )
    touched = torch.minimum(touched, last)
    page = table.gather(1, touched).long()
    scales = None if key_scales is None else key_scales[:, page]
    keys = decode(key_pages[:, page], scales, statistics.dtype)
    place = torch.arange(PAGE, device=past.device)
    held = touched[..., None] * PAGE + place < total[:, None, None]
    parts = keys.unflatten(3, (PAGE // LOGICAL, LOGICAL))
    held = held.unflatten(2, (PAGE // LOGICAL, LOGICAL))[..., None]
    statistics[:, page] = torch.stack(judge(parts, held), 4).to(statistics.dtype)


def least_and_greatest(parts: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
    """Return the least and greatest of ``parts`` [..., LOGICAL, D] that are held."""
    low = parts.masked_fill(~held, float("inf")).amin(-2)
    return low, parts.masked_fill(~held, float("-inf")).amax(-2)


def mean_and_spread(parts: Tensor, held: Tensor) -> tuple[Tensor, Tensor]:
    """Return their mean less and plus `SPREAD` standard deviations; NaN for none."""
    wide = parts.to(torch.promote_types(parts.dtype, torch.float32))
    count = held.sum(-2)
    mean = wide.masked_fill(~held, 0.0).sum(-2) / count
    off = (wide - mean.unsqueeze(-2)).masked_fill(~held, 0.0)
    spread = SPREAD * (off.square().sum(-2) / count).sqrt()
    return mean - spread, mean + spread


@torch.library.impl(_library, "append_pages", "CUDA")
def _cuda(*inputs: Any) -> None:
    from graphopt.codegen.triton import pages_append as kernel

    if kernel.supports(inputs[0].dtype):
        kernel.launch(*inputs)
    else:
        append_reference(*inputs)


@torch.library.impl(_library, "append_pages", "CPU")
def _cpu(*inputs: Any) -> None:
    from graphopt.codegen.cpp import pages as kernel

    if kernel.supports(inputs[0].dtype):
        kernel.append(*inputs)
    else:
        append_reference(*inputs)
