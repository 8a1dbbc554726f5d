"""Parameters by name, whatever module was compiled around the model."""

from __future__ import annotations

from collections.abc import Iterable


def find_name(name: str, known: Iterable[str]) -> str | None:
    """Return the one of ``known`` that names the same parameter as ``name``.

    A model that is compiled inside another module has a longer name there, and one of
    which a part is compiled a shorter one. None where nothing ends alike, or more than
    one thing ends as a shorter ``name`` does.
    """
    names = set(known)
    if name in names:
        return name
    ends = [k for k in names if name.endswith(f".{k}") or k.endswith(f".{name}")]
    inner = [k for k in ends if len(k) < len(name)]
    if inner:  # ends of one name: the longest says the most
        return max(inner, key=len)
    return ends[0] if len(ends) == 1 else None
