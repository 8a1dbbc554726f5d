"""graphopt: graph passes and emitted kernels for transformer inference."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from graphopt.backend import compile, last_reports
    from graphopt.ensembles import ensemble
    from graphopt.runtime.cache import Cache

__version__ = "0.1.0"
__all__ = ["Cache", "__version__", "compile", "ensemble", "last_reports"]


def __getattr__(name: str) -> Any:
    """Import the backend, and torch with it, only when it is used."""
    if name in ("compile", "last_reports"):
        from graphopt import backend

        return getattr(backend, name)
    if name == "Cache":
        from graphopt.runtime.cache import Cache

        return Cache
    if name == "ensemble":
        from graphopt.ensembles import ensemble

        return ensemble
    raise AttributeError(f"module 'graphopt' has no attribute '{name}'")
