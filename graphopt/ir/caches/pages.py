"""Writes of keys and values into the pages of `graphopt.Cache`."""

from __future__ import annotations

from typing import Any

from torch import fx

from graphopt.ir.attention.pages import PagedSite, PlacedSite, read_of
from graphopt.ir.attention.site import AttentionSite
from graphopt.ir.caches.state import CacheState
from graphopt.ir.match import op_name

_WRITES = ("graphopt.append_pages", "graphopt.write_tokens")
_POOLS = (4, 5)  # where they have the pools of keys and of values


class PageWrites:
    """The nodes of a graph that write to pages, by the pool of keys."""

    def __init__(self, graph: fx.Graph) -> None:
        found = (n for n in graph.nodes if op_name(n) in _WRITES)
        self._by_pool: dict[Any, fx.Node] = {
            node.args[_POOLS[0]]: node for node in found
        }

    def append_of(self, site: AttentionSite) -> fx.Node | None:
        """Return the node that appends the keys of ``site``, or None."""
        return self._by_pool.get(self._pool(site))

    def of(self, site: AttentionSite) -> tuple[CacheState, CacheState] | None:
        """Return the states of keys and values where ``site`` writes to pages."""
        pool = self._pool(site)
        append: Any = self._by_pool.get(pool)
        if append is None:
            return None
        given = pool is not None and pool.op == "placeholder"
        key, value = (
            CacheState(
                append.args[place] if given else None,
                _source(append.args[i]),
                attended,
                append.args[place],
            )
            for i, (place, attended) in enumerate(
                zip(_POOLS, (site.key, site.value), strict=True)
            )
        )
        return key, value

    def _pool(self, site: AttentionSite) -> fx.Node | None:
        if isinstance(site, (PagedSite, PlacedSite)):
            return site.key
        if read := read_of(site):
            return read.args[0]  # type: ignore[return-value]
        appends = self._by_pool.items()
        own = (pool for pool, n in appends if _source(n.args[0]) is site.key)
        return next(own, None)


def _source(node: object) -> fx.Node:
    """Return what is appended: rings take some heads of it, and nothing trains."""
    while isinstance(node, fx.Node) and op_name(node) in ("detach", "getitem"):
        node = node.args[0]
    assert isinstance(node, fx.Node)
    return node
