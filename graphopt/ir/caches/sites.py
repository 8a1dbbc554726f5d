"""Cache sites: what each attention reads from and writes to the key-value cache.

The cache's object is gone from a graph; what is left of it depends on its kind:

- concat (DynamicCache): ``cat([past, new], -2)`` is attended over and returned; a
  sliding window returns only its last keys. The first prefill has no past.
- in-place (StaticCache): the new keys are copied into a buffer, and the buffer, or its
  first keys, is attended over. A window that is full is rolled or shifted first.
- read: the keys of a past that no longer grows (cross-attention);
- paged (`graphopt.Cache`): an operator writes the new keys into pages. A first prefill
  attends to the new keys themselves, later calls to a copy of the pages' or to the
  pages.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import fx

from graphopt._compat import placeholder_source
from graphopt.ir.attention.site import AttentionSite
from graphopt.ir.caches.pages import PageWrites
from graphopt.ir.caches.state import CacheState
from graphopt.ir.caches.writes import Writes, concatenated, whole
from graphopt.ir.match import shape_of


@dataclass(frozen=True)
class CacheSite:
    """The cache of attention ``index``: ``kind`` concat, in-place, read or paged."""

    index: int
    kind: str
    key: CacheState
    value: CacheState


def find_caches(
    gm: fx.GraphModule, attention: Sequence[AttentionSite]
) -> list[CacheSite]:
    """Return the cache sites in graph order; attention without a cache has none."""
    writes, pages = Writes(gm.graph), PageWrites(gm.graph)
    found = []
    for site in attention:
        if states := pages.of(site):
            found.append(CacheSite(site.index, "paged", *states))
            continue
        key, value = _state(site.key, writes), _state(site.value, writes)
        if key is not None and value is not None and key[0] == value[0]:
            found.append(CacheSite(site.index, key[0], key[1], value[1]))
    return found


def _state(attended: fx.Node, writes: Writes) -> tuple[str, CacheState] | None:
    if len(shape_of(attended) or ()) != 4:
        return None
    base = whole(attended)
    written = writes.into(base) if writes.outlives(base) else None
    if written is not None:
        past = base if is_given(base) else None
        return "in-place", CacheState(past, written, attended, base)
    if is_given(base):
        return "read", CacheState(base, None, attended, None)
    return _grown(attended, base, writes)


def _grown(
    attended: fx.Node, base: fx.Node, writes: Writes
) -> tuple[str, CacheState] | None:
    """Read a past with new tokens behind it, or the first ones, that the caller gets.

    A cat with anything else in front, such as a learned prefix, is no cache.
    """
    parts, kept = concatenated(base), writes.kept(base)
    first = whole(parts[0]) if parts else None
    past = None if first is None or _is_empty(first) else first
    if kept is None or (past is not None and not is_given(past)):
        return None
    kind = "in-place" if writes.into(kept) is not None else "concat"
    return kind, CacheState(past, parts[1] if parts else base, attended, kept)


def _is_empty(node: fx.Node) -> bool:
    return any(size == 0 for size in shape_of(node) or ())


def is_given(node: fx.Node) -> bool:
    """Tell whether the caller gave ``node``: an input, no parameter or buffer."""
    given = node.op == "placeholder"
    return given and not placeholder_source(node).startswith("L['self']")
