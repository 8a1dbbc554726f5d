"""The pool of pages as a transformers cache, for one step of a ragged batch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache as TransformersCache

from graphopt import ops as _ops  # noqa: F401  registers the operators
from graphopt.ops.pages import PAGE
from graphopt.runtime.engine.batch import Piece

# More keys than any window is long: a model that sees less leaves its window out.
BEYOND = 1 << 20

LayerShape = tuple[int, int, int]  # heads, channels of a key, of a value


class RaggedCache(TransformersCache):
    """Pages of all layers, and which tokens of the step belong to which request.

    ``keys`` and ``values`` [Hkv, pages, PAGE, D] a layer; ``starts`` int32 [R + 1],
    ``past`` int32 [R] and ``table`` int32 [R, M] as in `graphopt.ops.pages.ragged`,
    with room for R requests of M pages; rows without a request have no tokens.

    A model that is given it sees a batch of one row without a past: its attention is
    right only in a graph that `ragged-batch` has rewritten.
    """

    def __init__(
        self,
        shapes: Sequence[LayerShape],
        pages: int,
        rows: int,
        row_pages: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        super().__init__(layers=[])
        kept: dict[str, Any] = {"dtype": dtype, "device": device}
        index: dict[str, Any] = {"dtype": torch.int32, "device": device}
        self.keys = [torch.zeros((h, pages, PAGE, d), **kept) for h, d, _ in shapes]
        self.values = [torch.zeros((h, pages, PAGE, d), **kept) for h, _, d in shapes]
        self.starts = torch.zeros(rows + 1, **index)
        self.past = torch.zeros(rows, **index)
        self.table = torch.zeros((rows, row_pages), **index)

    @property
    def nbytes(self) -> int:
        """Return the bytes of all pages."""
        return sum(t.nbytes for t in (*self.keys, *self.values))

    def place(self, pieces: Sequence[Piece]) -> None:
        """Say where the tokens of ``pieces``, one behind the other, belong."""
        starts, tokens = [0], 0
        table = torch.zeros(self.table.shape, dtype=torch.int32)
        for row, piece in enumerate(pieces):
            tokens += len(piece.tokens)
            starts.append(tokens)
            table[row, : len(piece.pages)] = torch.tensor(piece.pages)
        starts += [tokens] * (len(self.starts) - len(starts))
        past = [piece.past for piece in pieces]
        past += [0] * (len(self.past) - len(past))
        self.starts.copy_(torch.tensor(starts, dtype=torch.int32))
        self.past.copy_(torch.tensor(past, dtype=torch.int32))
        self.table.copy_(table)

    def update(
        self,
        key_states: Tensor,
        value_states: Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[Tensor, Tensor]:
        """Write key [1, Hkv, N, D] and value [1, Hkv, N, Dv] to pages.

        Returns them with `BEYOND` more behind them, which causal attention never sees.
        """
        torch.ops.graphopt.append_ragged(
            key_states, value_states, self.starts, self.past, self.table,
            self.keys[layer_idx], self.values[layer_idx], None, None,
        )  # fmt: skip
        return _extended(key_states), _extended(value_states)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return 0: to the model all tokens are new."""
        return 0

    def get_mask_sizes(self, query_length: int, layer_idx: int) -> tuple[int, int]:
        """Return how many keys the model believes there are, and the first's place."""
        return query_length + BEYOND, 0


def _extended(x: Tensor) -> Tensor:
    sizes = (*x.shape[:2], BEYOND, x.shape[3])
    return torch.cat((x, x.new_zeros((1, 1, 1, 1)).expand(sizes)), dim=2)
