"""What one attention does with the cached keys, or with the values."""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx


@dataclass(frozen=True)
class CacheState:
    """The keys, or the values, of one attention.

    ``past`` [B, Hkv, P, D] is what earlier calls left, None in a first prefill;
    ``new`` [B, Hkv, Sq, D] what this call adds, None where the cache is only read;
    ``attended`` [B, Hkv, Skv, D] what attention sees, the site's key or value;
    ``kept`` what later calls find: an output of the graph, or the buffer written to.
    """

    past: fx.Node | None
    new: fx.Node | None
    attended: fx.Node
    kept: fx.Node | None
