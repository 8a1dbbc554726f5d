"""What outlives a call: caches, pages, and the engine that serves requests."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphopt.runtime.engine import Engine, EngineOptions, SamplingParams

__all__ = ["Engine", "EngineOptions", "SamplingParams"]


def __getattr__(name: str) -> Any:
    """Import the engine only when it is used."""
    if name in __all__:
        from graphopt.runtime import engine

        return getattr(engine, name)
    raise AttributeError(f"module 'graphopt.runtime' has no attribute '{name}'")
