"""How many tokens each batch row holds, and which pages are its own.

Every batch row has room for M pages in each pool; page p of row b is written at its
home ``b * M + p``. Full pages may be shared: after a beam search's reorder a row reads
the pages of others, through its table, and only the page it goes on writing is copied.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from graphopt.ops.pages import PAGE, pages_of


class Rows:
    """The lengths and tables that all layers of a cache share.

    ``lengths``, ``past``: int32 [B], tokens with and without those of the running call.
    ``table``: int32 [B, M]. ``tokens``, ``past_tokens``: the longest row's tokens, as
    the size of an empty tensor: a Python number would be compiled into the graph, and a
    tensor's value would have to be waited for.
    """

    def __init__(self) -> None:
        self.lengths: Tensor | None = None
        self.past: Tensor | None = None
        self.table: Tensor | None = None
        self.mark: Tensor | None = None
        self.past_mark: Tensor | None = None
        self.ragged = False  # rows of different lengths
        self.shared = False  # some row reads pages of another

    @property
    def tokens(self) -> int:
        """Return the tokens of the longest row, those of the running call too."""
        return 0 if self.mark is None else self.mark.shape[0]

    @property
    def past_tokens(self) -> int:
        """Return the tokens of the longest row before the running call."""
        return 0 if self.past_mark is None else self.past_mark.shape[0]

    @property
    def capacity(self) -> int:
        """Return how many tokens a row has room for."""
        return 0 if self.table is None else self.table.shape[1] * PAGE

    def allocate(self, batch: int, pages: int, device: torch.device) -> None:
        """Give every row its own pages, all of them free."""
        self.lengths = torch.zeros(batch, dtype=torch.int32, device=device)
        self.table = home(batch, pages, device)
        self.mark = _mark(0, device)

    def begin(self, new: int) -> None:
        """Count ``new`` tokens that a call is about to append to every row."""
        assert self.lengths is not None and self.mark is not None
        self.past, self.past_mark = self.lengths.clone(), self.mark
        self.mark = _mark(self.past_tokens + new, self.mark.device)
        self.lengths.add_(new)

    def grow(self, pages: int) -> None:
        """Give every row ``pages`` pages; the pools grow by `grown`."""
        assert self.table is not None
        batch, before = self.table.shape
        row, page = self.table // before, self.table % before
        fresh = home(batch, pages, self.table.device)[:, before:]
        self.table = torch.cat((row * pages + page, fresh), 1)

    def set_lengths(self, lengths: Iterable[int]) -> None:
        """Hold these many tokens in each row."""
        assert self.lengths is not None
        values = list(lengths)
        device = self.lengths.device
        self.lengths.copy_(torch.tensor(values, dtype=torch.int32))
        self.mark, self.past, self.past_mark = _mark(max(values), device), None, None


def home(batch: int, pages: int, device: torch.device) -> Tensor:
    """Return the table in which every row reads its own pages, int32 [B, M]."""
    places = torch.arange(batch * pages, dtype=torch.int32, device=device)
    return places.view(batch, pages)


def _mark(tokens: int, device: torch.device) -> Tensor:
    return torch.empty((tokens, 0), device=device)


def grown(pool: Tensor, batch: int, pages: int) -> Tensor:
    """Return a pool [H, B * M, ...] with room for ``pages`` pages a row."""
    parts = pool.unflatten(1, (batch, -1))
    more = parts.new_empty((*parts.shape[:2], pages - parts.shape[2], *parts.shape[3:]))
    return torch.cat((parts, more), 2).flatten(1, 2)


def room_for(tokens: int) -> int:
    """Return how many pages to give a row that is about to hold ``tokens`` tokens."""
    return pages_of(tokens + max(tokens, 1024))
