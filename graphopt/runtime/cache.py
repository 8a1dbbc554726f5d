"""`graphopt.Cache`: keys and values in pages, for transformers' ``generate``."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.cache_utils import Cache as TransformersCache

from graphopt.config import load_config
from graphopt.errors import ConfigError
from graphopt.ops.pages import PAGE, pages_of
from graphopt.runtime.layer import PagedLayer
from graphopt.runtime.movable import MovableRows
from graphopt.runtime.neurons import CoreNeurons
from graphopt.runtime.pool import Rings
from graphopt.runtime.ranks import share_of_model
from graphopt.runtime.rows import Rows, room_for
from graphopt.runtime.states import HiddenStates

KvDtype = Literal["int8", "int4"]
Statistics = Literal["spread", "extremes"]


def wanted_by(config: Any) -> dict[str, Any] | None:
    """Return the arguments of the `Cache` that a pass config needs; None for none.

    ``streaming`` may be a function of the rank's share of the heads.
    """
    found: dict[str, Any] | None = None
    for item in load_config(config).pipeline:
        if (options := item.cache_options()) is not None:
            found = {**(found or {}), **options}
    return found


class Cache(MovableRows, TransformersCache):
    """A transformers cache whose keys and values lie in pages of 64 tokens.

    ``model.generate(..., past_key_values=graphopt.Cache())`` gives the tokens that
    ``DynamicCache`` gives, without copying the past at every step, and hands the pages
    to the passes that read only some (`page-selection`).

    ``max_tokens``: room for so many tokens a row, made once: no tensor ever moves.
    Without it a row has twice its prompt's room and grows when that is used up, at the
    price of another compilation of the decoding step.
    ``kv_dtype``: keep int8 or int4 codes with a scale per token and head.
    ``statistics``: what pages are judged by, for every 16 tokens: the mean key and its
    spread, or the least and greatest of each channel (Quest, Tang et al. 2024), whose
    bound is loose: the mean finds the pages with the mass far better.
    ``streaming``: per layer, the KV heads that keep a ring only: the first ``sink`` and
    at least the last ``local`` tokens (LServe, Yang et al. 2025, section 3.3;
    DuoAttention, Xiao et al. 2024). Such a model must be compiled with a pass that
    reads rings.
    ``dropping``: each layer counts its own tokens, so that `token-drop` can keep fewer
    in some. Such a model must be compiled with that pass for decoding too.
    ``hidden_size``: keep the hidden states, of so many channels, of tokens that
    `token-drop` drops, so that they can come back in later steps (LazyLLM).
    ``neurons``: keep the neurons that `neuron-mask` chooses for the prompt, with their
    weights, for decoding to compute (CoreInfer). Such a model must be compiled with
    that pass; `from_config` makes them.

    Raises ConfigError for values that are no whole pages or name no dtype.
    """

    def __init__(
        self,
        *,
        max_tokens: int | None = None,
        kv_dtype: KvDtype | None = None,
        statistics: Statistics = "spread",
        streaming: list[list[int]] | None = None,
        sink: int = 128,
        local: int = 256,
        dropping: bool = False,
        hidden_size: int | None = None,
        neurons: CoreNeurons | None = None,
    ) -> None:
        super().__init__(layers=[])
        if kv_dtype not in (None, "int8", "int4"):
            raise ConfigError(
                f"Cache: kv_dtype = {kv_dtype!r} is unknown; use 'int8', 'int4', or "
                "None for the model's own"
            )
        if statistics not in ("spread", "extremes"):
            raise ConfigError(
                f"Cache: statistics = {statistics!r} is unknown; use 'spread' or "
                "'extremes'"
            )
        for name, size in (("sink", sink), ("local", local)):
            if size % PAGE or size < (PAGE if name == "local" else 0):
                raise ConfigError(
                    f"Cache: {name} = {size} must be a multiple of the page, {PAGE}"
                )
        self.max_tokens, self.kv_dtype = max_tokens, kv_dtype
        self.statistics = statistics
        self.streaming, self.sink, self.local = streaming, sink, local
        if hidden_size is not None and (dropping or streaming is not None):
            raise ConfigError(
                "Cache: hidden_size keeps dropped tokens' places, and neither layers "
                "that count for themselves (dropping) nor rings (streaming) have them"
            )
        self.dropping, self.hidden_size = dropping, hidden_size
        self.hidden: HiddenStates | None = None
        self.neurons = neurons
        self.rows = Rows()
        self._last = -1

    @classmethod
    def from_config(cls, config: Any, model: Any = None, **options: Any) -> Cache:
        """Make the cache that a pass config asks for; ``options`` take precedence.

        ``config`` is what `graphopt.compile` takes. ``model``: the transformers model,
        whose hidden size a pass may need that lets dropped tokens come back
        (``revive``), and whose feed-forward networks `neuron-mask` needs. One that
        ranks share out tells which streaming heads are this rank's. Raises ConfigError
        for a bad config, and without a model where it is needed.
        """
        found = {**(wanted_by(config) or {}), **options}
        if callable(rings := found.get("streaming")):
            found["streaming"] = rings(share_of_model(model))
        reviving, rule = found.pop("reviving", False), found.pop("masking", None)
        if reviving and "hidden_size" not in options:
            _need(
                model,
                "revives dropped tokens, whose hidden states have the model's size: "
                "give model=..., or set revive = false in it",
            )
            found["hidden_size"] = model.config.get_text_config().hidden_size
        if rule is not None and "neurons" not in options:
            _need(
                model, "masks neurons, whose weights have the model's sizes: model=..."
            )
            found["neurons"] = CoreNeurons.of(model, rule)
        return cls(**found)

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
            self.layers.append(self.new_layer(len(self.layers)))
        layer = self.layers[layer_idx]
        if not layer.is_initialized:
            layer.lazy_initialization(key_states, value_states)
        if self.neurons is not None:
            self.neurons.hold(layer_idx)
        return layer.update(key_states, value_states)

    def new_layer(self, index: int) -> PagedLayer:
        """Return layer ``index`` without pools."""
        extremes = self.statistics == "extremes"
        rings = self.rings_of(index)
        kind = self.kv_dtype or ""
        return PagedLayer(self.rows, rings, kind, extremes, self.dropping)

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
        if self.hidden_size is not None:
            if self.hidden is None:
                self.add_states(key)
            assert self.hidden is not None and rows.past is not None
            self.hidden.hold(rows.past, new)
        if self.neurons is not None:
            self.neurons.begin(rows, new)

    def allocate(self, batch: int, tokens: int, device: torch.device) -> None:
        """Give ``batch`` empty rows room for ``tokens`` tokens, or ``max_tokens``."""
        limit = self.max_tokens
        pages = room_for(tokens) if limit is None else pages_of(limit)
        self.rows.allocate(batch, pages, device)

    def add_states(self, like: Tensor) -> None:
        """Make room for dropped tokens' hidden states, of the dtype of ``like``."""
        assert self.rows.table is not None and self.hidden_size is not None
        batch, room = self.rows.table.shape[0], self.rows.capacity
        self.hidden = HiddenStates.like(batch, room, self.hidden_size, like)

    def _grow(self, tokens: int) -> None:
        if self.max_tokens is not None:
            raise ConfigError(
                f"Cache: {tokens} tokens do not fit in max_tokens = {self.max_tokens}; "
                "make the cache larger, or leave max_tokens out and it grows"
            )
        assert self.rows.table is not None
        batch, pages = self.rows.table.shape[0], room_for(tokens)
        self.rows.grow(pages)
        for layer in self.paged_layers():
            layer.grow(batch, pages)
        if self.hidden is not None:
            self.hidden.grow(self.rows.capacity)

    @property
    def nbytes(self) -> int:
        """Return the bytes of pages, statistics, scales, hidden states and neurons."""
        kept = [t for layer in self.paged_layers() for t in layer.tensors()]
        kept += [] if self.hidden is None else self.hidden.tensors()
        kept += [] if self.neurons is None else self.neurons.tensors()
        return sum(t.nbytes for t in kept)

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


def _need(model: Any, why: str) -> None:
    if model is None:
        raise ConfigError(f"Cache.from_config: the pass config {why}")
