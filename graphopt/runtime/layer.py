"""One layer of the cache: its pools, and the choice of pages it made last."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import CacheLayerMixin

from graphopt.errors import ConfigError
from graphopt.ops.pages import LOGICAL, PAGE
from graphopt.runtime.pool import POOL, Pool, Rings, ring_table
from graphopt.runtime.rows import Rows, grown


class PagedLayer(CacheLayerMixin):
    """Keys [B, Hkv, S, D] and values [B, Hkv, S, Dv] of one layer, in pages."""

    is_sliding = False
    is_croppable = True

    def __init__(
        self,
        rows: Rows,
        rings: Rings,
        kind: str,
        extremes: bool = False,
        dropping: bool = False,
    ) -> None:
        super().__init__()
        self.rows, self.rings, self.kind, self.extremes = rows, rings, kind, extremes
        self.dropping = dropping

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Make the pools for tensors like these; nothing is written yet."""
        assert self.rows.table is not None
        batch, pages = self.rows.table.shape
        # Dynamo (torch 2.13) traces `0 in self.heads` as false: no `in` here.
        rings = self.rings.heads
        if rings and max(rings) >= key_states.shape[1]:
            raise ConfigError(
                f"Cache: streaming names KV head {max(rings)} of a layer that has "
                f"{key_states.shape[1]}"
            )
        every = range(key_states.shape[1])
        self.full_heads = [h for h in every if not any(h == r for r in rings)]
        heads = len(self.full_heads)
        self.dtype, self.device = key_states.dtype, key_states.device
        self.full = Pool.like(heads, batch * pages, key_states, value_states, self.kind)
        statistics = (heads, batch * pages, PAGE // LOGICAL, 2, key_states.shape[-1])
        self.statistics = torch.empty(statistics, dtype=self.dtype, device=self.device)
        self.selected = self._new((batch, heads, pages), key_states)
        self.selected_at = self._new((batch, heads), key_states)
        # Where tokens may be dropped a layer counts its own: int32 [B].
        self.lengths: Tensor | None = None
        if self.dropping:
            self.lengths = torch.zeros(batch, dtype=torch.int32, device=self.device)
        self.ring: Pool | None = None
        self.ring_table: Tensor | None = None
        if self.rings.heads:
            self._add_ring(batch, pages, key_states, value_states)
        self.is_initialized = True

    def _new(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        return torch.full(shape, -1, dtype=torch.int32, device=like.device)

    def _add_ring(self, batch: int, pages: int, key: Tensor, value: Tensor) -> None:
        room = self.rings.pages
        heads = len(self.rings.heads)
        self.ring = Pool.like(heads, batch * room + 1, key, value, self.kind)
        self.place_rings(batch, pages)

    def place_rings(self, batch: int, pages: int) -> None:
        """Say where ``pages`` stretches of ``batch`` rows lie in the rings' pool."""
        if self.ring is not None:
            self.ring_table = ring_table(self.rings, batch, pages, self.device)

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Append to the pages; return all keys and values for attention to see."""
        key, value = key_states.detach(), value_states.detach()
        self._check(key, value)
        rows, past = self.rows, self._past(key.shape[2])
        append = torch.ops.graphopt.append_pages
        some = (key, value)
        if self.ring is not None:
            some = (key[:, self.full_heads], value[:, self.full_heads])
        pools = self.full.tensors()
        judged = (self.statistics, 0, 0, self.extremes)
        append(*some, past, rows.table, *pools, *judged)
        if self.ring is not None:
            rings = list(self.rings.heads)
            some = (key[:, rings], value[:, rings])
            keep = (self.rings.sink_pages, self.rings.ring_pages)
            append(*some, past, self.ring_table, *self.ring.tensors(), None, *keep)
        if rows.past_tokens == 0:
            return key_states, value_states
        return torch.ops.graphopt.read_pages(
            *self.held(past, key.shape[2]), self.statistics, self.selected,
            self.selected_at, rows.tokens, self.dtype,
            None if self.lengths is None else rows.lengths,
        )  # fmt: skip

    def _past(self, new: int) -> Tensor:
        """Return the tokens before this call, int32 [B]; count ``new`` ones."""
        if self.lengths is None:
            assert self.rows.past is not None
            return self.rows.past
        past = self.lengths.clone()
        self.lengths.add_(new)
        return past

    def _check(self, key: Tensor, value: Tensor) -> None:
        """Refuse tensors of another model or batch.

        In a compiled graph this is also what ties the pools' sizes to the model's: all
        that is left unknown is how many pages a row has room for.
        """
        assert self.rows.table is not None
        batch, pages = self.rows.table.shape
        full, state = self.full, (batch, self.full.keys.shape[0])
        heads = full.keys.shape[0] + len(self.rings.heads)
        fits = (key.shape[0], key.shape[1]) == (batch, heads)
        shape = (full.keys.shape[0], batch * pages, PAGE)
        fits = fits and full.keys.shape[:3] == shape and full.values.shape[:3] == shape
        parts = (*shape[:2], PAGE // LOGICAL, 2, key.shape[3])
        fits = fits and self.statistics.shape == parts
        fits = fits and self.selected.shape == (*state, pages)
        if self.lengths is not None:
            assert self.rows.lengths is not None
            counted = (self.lengths.shape[0], self.rows.lengths.shape[0])
            fits = fits and counted == (batch, batch)
        if not fits or self.selected_at.shape != state:
            raise ConfigError(
                f"Cache: keys of {tuple(key.shape)} do not fit a cache of {batch} rows "
                f"and {heads} KV heads; make a new one, or reset a cache only for the "
                "same model and batch"
            )

    def held(self, past: Tensor, new: int) -> tuple[Any, ...]:
        """Return the arguments of `graphopt.ops.pages.Held`."""
        ring: tuple[Tensor | None, ...] = (None,) * 5
        if self.ring is not None:
            ring = (*self.ring.tensors(), self.ring_table)
        keep = (list(self.rings.heads), self.rings.sink_pages, self.rings.ring_pages)
        full = (*self.full.tensors(), self.rows.table)
        return *full, *ring, *keep, past, new

    def get_seq_length(self) -> int:
        """Return the tokens of the longest row."""
        return self.rows.tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return how many keys attention will see, and the position of the first."""
        return self.rows.tokens + query_length, 0

    def get_max_length(self) -> int:
        """Return -1: a cache grows."""
        return -1

    def tensors(self) -> list[Tensor]:
        """Return everything the layer keeps of its tokens."""
        pools = [self.full] if self.ring is None else [self.full, self.ring]
        kept = [t for pool in pools for t in pool.tensors() if t is not None]
        return [*kept, self.statistics]

    def grow(self, batch: int, pages: int) -> None:
        """Give every row ``pages`` pages."""
        for name in POOL:
            pool = getattr(self.full, name)
            if pool is not None:
                setattr(self.full, name, grown(pool, batch, pages))
        self.statistics = grown(self.statistics, batch, pages)
        more = pages - self.selected.shape[2]
        self.selected = torch.nn.functional.pad(self.selected, (0, more), value=-1)
        self.place_rings(batch, pages)

    def forget_choice(self) -> None:
        """Choose pages anew at the next step."""
        self.selected_at.fill_(-1)

    def reset(self) -> None:
        """Forget the tokens; pools stay where they are."""
        if self.is_initialized:
            self.forget_choice()
            if self.lengths is not None:
                self.lengths.zero_()
