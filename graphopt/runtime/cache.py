"""`graphopt.Cache`: keys and values in pages, for transformers' ``generate``."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.cache_utils import Cache as TransformersCache

from graphopt.config import load_config
from graphopt.errors import ConfigError
from graphopt.ops.pages import PAGE, pages_of
from graphopt.runtime.layer import PagedLayer, Rings
from graphopt.runtime.moves import own_all_pages, reorder
from graphopt.runtime.rows import Rows, home, room_for

KvDtype = Literal["int8", "int4"]


def wanted_by(config: Any) -> dict[str, Any] | None:
    """Return the arguments of the `Cache` that a pass config needs; None for none."""
    asked = (item.cache_options() for item in load_config(config).pipeline)
    return next((options for options in asked if options is not None), None)


class Cache(TransformersCache):
    """A transformers cache whose keys and values lie in pages of 64 tokens.

    ``model.generate(..., past_key_values=graphopt.Cache())`` gives the tokens that
    ``DynamicCache`` gives, without copying the past at every step, and hands the pages
    to the passes that read only some (`page-selection`).

    ``max_tokens``: room for so many tokens a row, made once: no tensor ever moves.
    Without it a row has twice its prompt's room and grows when that is used up, at the
    price of another compilation of the decoding step.
    ``kv_dtype``: keep int8 or int4 codes with a scale per token and head.
    ``streaming``: per layer, the KV heads that keep a ring only: the first ``sink`` and
    at least the last ``local`` tokens (LServe, Yang et al. 2025, section 3.3;
    DuoAttention, Xiao et al. 2024). Such a model must be compiled with a pass that
    reads rings.

    Raises ConfigError for values that are no whole pages or name no dtype.
    """

    def __init__(
        self,
        *,
        max_tokens: int | None = None,
        kv_dtype: KvDtype | None = None,
        streaming: list[list[int]] | None = None,
        sink: int = 128,
        local: int = 256,
    ) -> None:
        super().__init__(layers=[])
        if kv_dtype not in (None, "int8", "int4"):
            raise ConfigError(
                f"Cache: kv_dtype = {kv_dtype!r} is unknown; use 'int8', 'int4', or "
                "None for the model's own"
            )
        for name, size in (("sink", sink), ("local", local)):
            if size % PAGE or size < (PAGE if name == "local" else 0):
                raise ConfigError(
                    f"Cache: {name} = {size} must be a multiple of the page, {PAGE}"
                )
        self.max_tokens, self.kv_dtype = max_tokens, kv_dtype
        self.streaming, self.sink, self.local = streaming, sink, local
        self.rows = Rows()
        self._last = -1

    @classmethod
    def from_config(cls, config: Any, **options: Any) -> Cache:
        """Make the cache that a pass config asks for; ``options`` take precedence.

        ``config`` is what `graphopt.compile` takes. Raises ConfigError for a bad one.
        """
        found = wanted_by(config) or {}
        return cls(**{**found, **options})

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Append key [B, Hkv, S, D] and value [B, Hkv, S, Dv] of layer ``layer_idx``.

        Returns all keys and values of the layer, [B, Hkv, past + S, D or Dv].
        """
        if self._last < 0 or layer_idx <= self._last:
            self._begin(key_states)
        self._last = layer_idx
        while len(self.layers) <= layer_idx:
            rings = self.rings_of(len(self.layers))
            self.layers.append(PagedLayer(self.rows, rings, self.kv_dtype or ""))
        layer = self.layers[layer_idx]
        if not layer.is_initialized:
            layer.lazy_initialization(key_states, value_states)
        return layer.update(key_states, value_states)

    def rings_of(self, index: int) -> Rings:
        """Return which heads of layer ``index`` keep a ring."""
        if self.streaming is None:
            return Rings()
        if index >= len(self.streaming):
            raise ConfigError(
                f"Cache: streaming names the heads of {len(self.streaming)} layers, "
                f"and the model has a layer {index}"
            )
        pages = (self.sink // PAGE, self.local // PAGE + 1)
        return Rings(tuple(self.streaming[index]), *pages)

    def _begin(self, key: Tensor) -> None:
        """Make room for a call's new tokens and count them."""
        rows, new = self.rows, key.shape[2]
        if rows.table is None:
            self.allocate(key.shape[0], new, key.device)
        if rows.tokens + new > rows.capacity:
            self._grow(rows.tokens + new)
        rows.begin(new)

    def allocate(self, batch: int, tokens: int, device: torch.device) -> None:
        """Give ``batch`` empty rows room for ``tokens`` tokens, or ``max_tokens``."""
        limit = self.max_tokens
        pages = room_for(tokens) if limit is None else pages_of(limit)
        self.rows.allocate(batch, pages, device)

    def _grow(self, tokens: int) -> None:
        if self.max_tokens is not None:
            raise ConfigError(
                f"Cache: {tokens} tokens do not fit in max_tokens = {self.max_tokens}; "
                "make the cache larger, or leave max_tokens out and it grows"
            )
        assert self.rows.table is not None
        batch, pages = self.rows.table.shape[0], room_for(tokens)
        self.rows.grow(pages)
        for layer in self._paged():
            layer.grow(batch, pages)

    def _paged(self) -> list[PagedLayer]:
        return [layer for layer in self.layers if layer.is_initialized]

    def reset(self) -> None:
        """Forget all tokens; the pages stay where they are."""
        if self.rows.lengths is not None:
            self.rows.set_lengths([0] * self.batch_size)
        rows = self.rows
        if rows.table is not None:
            batch, pages = rows.table.shape
            rows.table.copy_(home(batch, pages, rows.table.device))
        rows.ragged = rows.shared = False
        for layer in self._paged():
            layer.forget_choice()

    def crop(self, tokens_to_remove: int | Sequence[int]) -> None:
        """Forget the last tokens: so many of every row, or of each.

        As in transformers a number is negative, -3 for three tokens; a sequence holds
        one a row. Raises ConfigError where a ring has lost what would be newest again.
        """
        rows, layers = self.rows, self._paged()
        if rows.lengths is None:
            return
        removed = tokens_to_remove
        each = [removed] * self.batch_size if isinstance(removed, int) else removed
        if not any(each):
            return
        lengths = [n + r for n, r in zip(rows.lengths.tolist(), each, strict=True)]
        self._check_crop(lengths)
        if rows.shared:
            every = torch.arange(self.batch_size, device=self.device)
            own_all_pages(rows, layers, every)
        rows.set_lengths(lengths)
        rows.ragged = len(set(lengths)) > 1
        for layer in layers:
            layer.forget_choice()

    def _check_crop(self, lengths: Sequence[int]) -> None:
        assert self.rows.lengths is not None
        before = self.rows.lengths.tolist()
        for row, (old, new) in enumerate(zip(before, lengths, strict=True)):
            if not 0 <= new <= old:
                raise ConfigError(
                    f"Cache.crop: row {row} holds {old} tokens and cannot hold {new}"
                )
        room = self.sink + self.local + PAGE
        if self.streaming is not None and max(before) > room and lengths != before:
            raise ConfigError(
                f"Cache.crop: streaming heads keep {room} tokens and have dropped what "
                "came before the newest; reset the cache, or crop before that"
            )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row b go on as row ``beam_idx[b]`` was, for beam search."""
        if self.rows.lengths is not None:
            reorder(self.rows, self._paged(), beam_idx.to(self.device))

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times."""
        index = torch.arange(self.batch_size, device=self.device)
        self.batch_select_indices(index.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices`` only, in their order; a row may come twice."""
        if self.rows.lengths is not None:
            places = torch.arange(self.batch_size, device=self.device)
            own_all_pages(self.rows, self._paged(), places[indices.to(self.device)])

    def attention_mask(self, new_tokens: int = 0) -> Tensor:
        """Return which places of the longest row each row holds, int64 [B, S].

        ``new_tokens`` that are about to come count as held. Needed as the model's
        ``attention_mask`` once `crop` left rows of different lengths; such rows go on
        token by token.
        """
        assert self.rows.lengths is not None
        place = torch.arange(self.rows.tokens + new_tokens, device=self.device)
        return (place < self.rows.lengths[:, None] + new_tokens).long()

    @property
    def device(self) -> torch.device:
        """Return where the pages are."""
        table = self.rows.table
        return torch.device("cpu") if table is None else table.device

    @property
    def batch_size(self) -> int:
        """Return the number of batch rows, -1 before the first call."""
        return -1 if self.rows.table is None else self.rows.table.shape[0]

    @property
    def nbytes(self) -> int:
        """Return the bytes of all pages, statistics and scales."""
        return sum(t.nbytes for layer in self._paged() for t in layer.tensors())

    def save(self, path: str | Path) -> None:
        """Write the tokens' keys and values to a safetensors file."""
        from graphopt.runtime.files import save

        save(self, path)

    @classmethod
    def load(cls, path: str | Path, device: str | torch.device = "cpu") -> Cache:
        """Read what `save` wrote. Raises ConfigError for another kind of file."""
        from graphopt.runtime.files import load

        return load(cls, path, device)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return the tokens of the longest row."""
        return self.rows.tokens

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return how many keys attention will see, and the position of the first."""
        return self.rows.tokens + query_length, 0
