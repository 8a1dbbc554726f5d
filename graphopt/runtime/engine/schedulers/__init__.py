"""How a step is filled: policies over views of requests, by name."""

from __future__ import annotations

from collections.abc import Callable

from graphopt.runtime.engine.schedulers.sarathi import Sarathi
from graphopt.runtime.engine.schedulers.views import (
    Board,
    Limits,
    Plan,
    Scheduler,
    View,
)
from graphopt.runtime.engine.schedulers.whole import (
    DecodeFirst,
    PrefillFirst,
    RequestLevel,
)

SCHEDULERS: dict[str, Callable[[], Scheduler]] = {
    "request-level": RequestLevel,
    "prefill-first": PrefillFirst,
    "decode-first": DecodeFirst,
    "sarathi": Sarathi,
}

__all__ = ["SCHEDULERS", "Board", "Limits", "Plan", "Scheduler", "View"]
