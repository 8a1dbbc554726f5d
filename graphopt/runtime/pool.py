"""The pages of some heads of a layer, and which heads keep a ring of them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from graphopt.ops.pages import PAGE

_CODES = {"int8": torch.int8, "int4": torch.uint8}


@dataclass(frozen=True)
class Rings:
    """Which KV heads of a layer keep a ring, and how much: pages, not tokens."""

    heads: tuple[int, ...] = ()
    sink_pages: int = 0
    ring_pages: int = 0

    @property
    def pages(self) -> int:
        """Return the pages that a batch row keeps."""
        return self.sink_pages + self.ring_pages


class Pool:
    """The pages of the keys and values of some heads of a layer."""

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None = None
    value_scales: Tensor | None = None

    @staticmethod
    def like(heads: int, pages: int, key: Tensor, value: Tensor, kind: str) -> Pool:
        """Return ``pages`` pages for tokens like those of key and value.

        No constructor takes the tensors: Dynamo makes an object that a graph leaves
        behind again from its constructor's arguments, and would return them for that.
        Nor are pages made by a method of the key: a graph would compute them from it.
        """
        pool = Pool()
        pool.keys = _pages(heads, pages, key, kind)
        pool.values = _pages(heads, pages, value, kind)
        if kind in _CODES:
            shape, kept = (heads, pages, PAGE, 2), torch.float16
            pool.key_scales = torch.empty(shape, dtype=kept, device=key.device)
            pool.value_scales = torch.empty(shape, dtype=kept, device=key.device)
        return pool

    def tensors(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """Return keys, values and their scales as the operators take them."""
        return self.keys, self.values, self.key_scales, self.value_scales


def _pages(heads: int, pages: int, like: Tensor, kind: str) -> Tensor:
    width = like.shape[-1] // (2 if kind == "int4" else 1)
    dtype = _CODES.get(kind, like.dtype)
    return torch.empty((heads, pages, PAGE, width), dtype=dtype, device=like.device)


POOL = ("keys", "values", "key_scales", "value_scales")


def ring_table(rings: Rings, batch: int, pages: int, device: torch.device) -> Tensor:
    """Return which page of a ring's pool holds stretch p of row b, int32 [B, M]."""
    stretch = torch.arange(pages, dtype=torch.int32, device=device)
    turned = (stretch - rings.sink_pages) % rings.ring_pages + rings.sink_pages
    place = torch.where(stretch < rings.sink_pages, stretch, turned)
    row = torch.arange(batch, dtype=torch.int32, device=device)[:, None]
    return row * rings.pages + place
