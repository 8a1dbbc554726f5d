"""How keys and values lie in pages: places, codes, statistics.

A pool ``[Hkv, N, PAGE, D]`` holds the pages of all batch rows, one row of `PAGE` tokens
after the other; ``table`` int32 [B, M] says which page of the pool holds the p-th
stretch of `PAGE` tokens of a batch row. A pool holds floats, or codes of them:

- int8: ``x = code * scale``, scale from the largest |x| of a token and head;
- int4 (uint8 of D / 2: channel j low, channel j + D / 2 high): ``x = code * scale +
  zero``, zero the smallest x of a token and head.

Scales are float16 [Hkv, N, PAGE, 2], scale and zero. Statistics are two keys for every
`LOGICAL` tokens, [Hkv, N, PAGE / LOGICAL, 2, D]: the smallest and the largest (Quest,
Tang et al. 2024; LServe, Yang et al. 2025: large pages to read, small ones to judge),
or the mean less and plus a little of the spread.

A ring keeps the pages of the first ``sink_pages`` and the newest ``ring_pages``; the
last page of its pool takes what is not kept.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.codegen.pages import LOGICAL, PAGE

_INT4_MAX = 15
_INT8_MAX = 127


def pages_of(tokens: int) -> int:
    """Return how many pages hold ``tokens`` tokens."""
    return (tokens + PAGE - 1) // PAGE


def encode(x: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes and scales [..., 2] of x [..., D] for a pool of ``like``'s dtype."""
    wide = x.float()
    if like.dtype == torch.int8:
        scale = _scale(wide.abs().amax(-1), _INT8_MAX)
        codes = (wide / scale[..., None]).round().clamp(-_INT8_MAX, _INT8_MAX)
        return codes.to(torch.int8), torch.stack((scale, torch.zeros_like(scale)), -1)
    zero = wide.amin(-1).half().float()
    scale = _scale(wide.amax(-1) - zero, _INT4_MAX)
    codes = ((wide - zero[..., None]) / scale[..., None]).round()
    low, high = codes.clamp(0, _INT4_MAX).to(torch.uint8).chunk(2, -1)
    return low | high << 4, torch.stack((scale, zero), -1)


def _scale(span: Tensor, steps: int) -> Tensor:
    """Scales are kept in float16; a span of nothing has any scale."""
    scale = (span / steps).half().float()
    return torch.where(scale > 0, scale, torch.ones_like(scale))


def decode(codes: Tensor, scales: Tensor | None, dtype: torch.dtype) -> Tensor:
    """Return what ``codes`` [..., D or D / 2] stand for; without scales, themselves."""
    if scales is None:
        return codes.to(dtype)
    scale, zero = scales.float()[..., None].unbind(-2)
    if codes.dtype == torch.uint8:
        codes = torch.cat((codes & _INT4_MAX, codes >> 4), -1)
    return (codes.float() * scale + zero).to(dtype)


def places(
    past: Tensor, new: int, table: Tensor, pages: int, sink_pages: int, ring_pages: int
) -> tuple[Tensor, Tensor]:
    """Return page of the pool and slot, each [B, new], of the tokens from ``past`` on.

    ``pages``: how many the pool has. What a ring does not keep goes to its last page.
    """
    position = past[:, None] + torch.arange(new, device=past.device)
    stretch = position // PAGE
    page = table.gather(1, stretch.clamp(max=table.shape[1] - 1)).long()
    if ring_pages:
        newest = (past + new - 1)[:, None] // PAGE
        dropped = (stretch >= sink_pages) & (stretch <= newest - ring_pages)
        page = page.masked_fill(dropped, pages - 1)
    return page, position % PAGE


__all__ = ["LOGICAL", "PAGE", "decode", "encode", "pages_of", "places"]
