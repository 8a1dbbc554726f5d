"""Moving, cropping and forgetting the rows of a cache, as transformers asks for it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from graphopt.errors import ConfigError
from graphopt.ops.pages import PAGE
from graphopt.runtime.layer import PagedLayer
from graphopt.runtime.moves import own_all_pages, reorder
from graphopt.runtime.neurons import CoreNeurons
from graphopt.runtime.rows import Rows, home
from graphopt.runtime.states import HiddenStates


class MovableRows:
    """The part of `graphopt.Cache` that acts between calls of the model."""

    rows: Rows
    layers: list[PagedLayer]
    hidden: HiddenStates | None
    neurons: CoreNeurons | None

    def paged_layers(self) -> list[PagedLayer]:
        """Return the layers that have pages already."""
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
        for layer in self.paged_layers():
            layer.reset()
        if self.hidden is not None:
            self.hidden.forget()
        if self.neurons is not None:
            self.neurons.forget()

    def crop(self, tokens_to_remove: int | Sequence[int]) -> None:
        """Forget the last tokens: so many of every row, or of each.

        As in transformers a number is negative, -3 for three tokens; a sequence holds
        one a row. Raises ConfigError where a ring has lost what would be newest again.
        """
        rows, layers = self.rows, self.paged_layers()
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
            if layer.lengths is not None:
                layer.lengths.copy_(rows.lengths)
        if self.hidden is not None:
            self.hidden.crop(rows.lengths)

    def _check_crop(self, lengths: Sequence[int]) -> None:
        assert self.rows.lengths is not None
        before = self.rows.lengths.tolist()
        if self._counts_differ() and lengths != before:
            raise ConfigError(
                "Cache.crop: tokens were dropped from it, and which of the rest are "
                "newest differs by layer; reset the cache, or crop before that"
            )
        for row, (old, new) in enumerate(zip(before, lengths, strict=True)):
            if not 0 <= new <= old:
                raise ConfigError(
                    f"Cache.crop: row {row} holds {old} tokens and cannot hold {new}"
                )
        rings = [layer.rings for layer in self.paged_layers() if layer.rings.heads]
        room = min((ring.pages * PAGE for ring in rings), default=max(before))
        if max(before) > room and lengths != before:
            raise ConfigError(
                f"Cache.crop: streaming heads keep {room} tokens and have dropped what "
                "came before the newest; reset the cache, or crop before that"
            )

    def reorder_cache(self, beam_idx: Tensor) -> None:
        """Let row b go on as row ``beam_idx[b]`` was, for beam search."""
        if self.hidden is not None:  # a token that comes back is written to its page
            self.batch_select_indices(beam_idx)
        elif self.rows.lengths is not None:
            source = beam_idx.to(self.device)
            reorder(self.rows, self.paged_layers(), source)
            if self.neurons is not None:
                self.neurons.select(source)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row ``repeats`` times."""
        index = torch.arange(self.batch_size, device=self.device)
        self.batch_select_indices(index.repeat_interleave(repeats))

    def batch_select_indices(self, indices: Tensor) -> None:
        """Keep the rows ``indices`` only, in their order; a row may come twice."""
        if self.rows.lengths is not None:
            places = torch.arange(self.batch_size, device=self.device)
            source = places[indices.to(self.device)]
            own_all_pages(self.rows, self.paged_layers(), source)
            if self.hidden is not None:
                self.hidden.select(source)
            if self.neurons is not None:
                self.neurons.select(source)

    def has_dropped(self) -> bool:
        """Tell whether some layer lacks some of the tokens (`token-drop`)."""
        gone = self.hidden is not None and self.hidden.lost()
        return gone or self._counts_differ()

    def _counts_differ(self) -> bool:
        came = self.rows.lengths
        own = [layer.lengths for layer in self.paged_layers()]
        counted = [n for n in own if n is not None]
        return came is not None and any(not torch.equal(n, came) for n in counted)

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
