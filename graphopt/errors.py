"""The errors that users see, each one message with place, cause and remedy."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class GraphoptError(Exception):
    """A mistake that its message explains; the command line shows no traceback."""


class ConfigError(GraphoptError):
    """A pass config that cannot be used: unknown name, bad value, bad syntax."""


class ModelError(GraphoptError):
    """A model that cannot be found, read or compiled."""


class KernelError(GraphoptError):
    """A kernel that cannot be emitted, built or loaded on this machine."""


class PassError(GraphoptError):
    """A pass that failed or broke the graph, raised in strict mode."""


class RanksError(GraphoptError):
    """Processes that hold one model together, and are lost or do not agree."""


def did_you_mean(name: str, allowed: Iterable[str]) -> str:
    """Return ``; did you mean 'x'?`` or the allowed names, to end a message with."""
    names = sorted(allowed)
    close = get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; allowed: {', '.join(names)}" if names else ""
