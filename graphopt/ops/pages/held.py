"""What a layer of the cache holds: the pages of its heads, as operators take them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from graphopt.codegen.pages import width
from graphopt.ops.pages.layout import PAGE, decode, pages_of

# The arguments that `Held.of` takes, in this order.
HELD = (
    "Tensor key_pages, Tensor value_pages, Tensor? key_scales, Tensor? value_scales, "
    "Tensor table, Tensor? ring_key_pages, Tensor? ring_value_pages, "
    "Tensor? ring_key_scales, Tensor? ring_value_scales, Tensor? ring_table, "
    "int[] ring_heads, int sink_pages, int ring_pages, Tensor past, SymInt new, "
)


class PageSet(NamedTuple):
    """The pages of some heads, as in `graphopt.ops.pages.layout`."""

    keys: Tensor
    values: Tensor
    key_scales: Tensor | None
    value_scales: Tensor | None
    table: Tensor

    def widths(self) -> tuple[int, int]:
        """Return the channels of keys and of values: int4 has two to a byte."""
        return width(self.keys), width(self.values)

    def read(self, held: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return key and value [B, H, S, D], zero where ``held`` [B, S] is false."""
        tokens = held.shape[1]
        page = self.table[:, : pages_of(tokens)].long()

        def gathered(pool: Tensor, scales: Tensor | None) -> Tensor:
            scales = None if scales is None else scales[:, page]
            x = decode(pool[:, page], scales, dtype).flatten(2, 3)[:, :, :tokens]
            x = x.masked_fill(~held[None, ..., None], 0.0)
            return x.transpose(0, 1).contiguous()

        return (
            gathered(self.keys, self.key_scales),
            gathered(self.values, self.value_scales),
        )


class Held(NamedTuple):
    """The pages of a layer: ``full`` of the heads that keep every token, ``ring`` of
    ``ring_heads``, which keep the first ``sink_pages`` and the newest ``ring_pages``.

    ``past`` int32 [B] and ``new``: the tokens of each batch row before this call, and
    the tokens that the call added.
    """

    full: PageSet
    ring: PageSet | None
    ring_heads: Sequence[int]
    sink_pages: int
    ring_pages: int
    past: Tensor
    new: int

    @staticmethod
    def of(*flat: Any) -> Held:
        """Return the arguments of `HELD`, named."""
        ring = None if flat[5] is None else PageSet(*flat[5:10])
        return Held(PageSet(*flat[:5]), ring, *flat[10:15])

    @property
    def heads(self) -> int:
        """Return the number of key heads."""
        return self.full.keys.shape[0] + len(self.ring_heads)

    @property
    def full_heads(self) -> list[int]:
        """Return the heads that keep every token."""
        return [h for h in range(self.heads) if h not in self.ring_heads]

    @property
    def total(self) -> Tensor:
        """Return the tokens of each batch row, int32 [B]."""
        return self.past + self.new

    def read(self, tokens: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return key and value [B, Hkv, tokens, D] of all heads.

        Zero beyond a row's own tokens and where a ring dropped them.
        """
        place = torch.arange(tokens, device=self.past.device)
        held = place < self.total[:, None]
        key, value = self.full.read(held, dtype)
        if self.ring is None:
            return key, value
        rings = self.ring.read(held & self.in_rings(place // PAGE), dtype)
        return self._merged(key, rings[0]), self._merged(value, rings[1])

    def in_rings(self, page: Tensor) -> Tensor:
        """Tell which of ``page`` [S] the rings of each row hold, bool [B, S]."""
        newest = ((self.total - 1) // PAGE)[:, None]
        near = (page > newest - self.ring_pages) & (page <= newest)
        return near | (page < self.sink_pages)

    def _merged(self, full: Tensor, ring: Tensor) -> Tensor:
        result = full.new_empty((full.shape[0], self.heads, *full.shape[2:]))
        result[:, self.full_heads] = full
        result[:, list(self.ring_heads)] = ring
        return result

    def kept_by_rings(self, tokens: int) -> bool:
        """Tell whether rings still hold all of the first ``tokens`` tokens."""
        room = self.sink_pages + self.ring_pages
        return self.ring is None or tokens <= room * PAGE
