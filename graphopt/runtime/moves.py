"""Moving batch rows between pages: beams, selections, crops."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from graphopt.ops.pages import PAGE
from graphopt.runtime.layer import PagedLayer
from graphopt.runtime.pool import POOL, Pool
from graphopt.runtime.rows import Rows, home


def reorder(rows: Rows, layers: list[PagedLayer], source: Tensor) -> None:
    """Let row b go on as row ``source[b]`` [B] was; full pages are shared, not copied.

    Only the page that a row goes on writing is copied to its home, and rings, which
    are written everywhere. Rows of different lengths share nothing, nor do rows whose
    layers may be of different lengths.
    """
    assert rows.table is not None and rows.lengths is not None
    if rows.ragged or any(layer.dropping for layer in layers):
        own_all_pages(rows, layers, source)
        return
    rows.shared = True
    rows.table = rows.table[source]
    own_last_page(rows, layers)
    for layer in layers:
        layer.selected = layer.selected[source]
        layer.selected_at = layer.selected_at[source]
        _move_rings(layer, source)


def own_last_page(rows: Rows, layers: list[PagedLayer]) -> None:
    """Copy the page that each row goes on writing to its home.

    All rows are equally long: nobody else reads the homes of that page.
    """
    assert rows.table is not None and rows.lengths is not None
    batch, pages = rows.table.shape
    last = (rows.lengths // PAGE).clamp(max=pages - 1)[:, None].long()
    places = home(batch, pages, rows.table.device)
    old, new = (t.gather(1, last)[:, 0].long() for t in (rows.table, places))
    for pool in _full(layers):
        pool[:, new] = pool[:, old]
    # Pages that no row has begun are always at home.
    stretch = home(1, pages, rows.table.device).long()
    rows.table = rows.table.where(stretch < last, places)


def own_all_pages(rows: Rows, layers: list[PagedLayer], source: Tensor) -> None:
    """Give row b pages of its own with what row ``source[b]`` [B'] holds."""
    assert rows.table is not None and rows.lengths is not None and rows.mark is not None
    table = rows.table[source].long()
    lengths, mark = rows.lengths[source], rows.mark
    batch, pages = table.shape
    rows.allocate(batch, pages, table.device)
    rows.lengths, rows.mark, rows.shared = lengths, mark, False
    for layer in layers:
        _copy_pages(layer.full, table)
        layer.statistics = layer.statistics[:, table].flatten(1, 2)
        layer.selected = layer.selected[source]
        layer.selected_at = layer.selected_at[source]
        if layer.lengths is not None:
            layer.lengths = layer.lengths[source]
        _move_rings(layer, source)


def _copy_pages(pool: Pool, table: Tensor) -> None:
    for name in POOL:
        pages = getattr(pool, name)
        if pages is not None:
            setattr(pool, name, pages[:, table].flatten(1, 2))


def _full(layers: list[PagedLayer]) -> Iterator[Tensor]:
    for layer in layers:
        yield from (t for t in layer.full.tensors() if t is not None)
        yield layer.statistics


def _move_rings(layer: PagedLayer, source: Tensor) -> None:
    """Rows of rings follow their tokens; a batch of another size gets new tables."""
    if layer.ring is None:
        return
    room = layer.rings.pages
    for name in POOL:
        pages = getattr(layer.ring, name)
        if pages is not None:
            rows = pages[:, :-1].unflatten(1, (-1, room))[:, source].flatten(1, 2)
            setattr(layer.ring, name, torch.cat((rows, pages[:, -1:]), 1))
    assert layer.ring_table is not None
    layer.place_rings(len(source), layer.ring_table.shape[1])
