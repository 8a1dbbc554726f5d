"""graphopt inside vLLM, by entry points alone: passes, attention, logit arithmetic.

``register`` is vLLM's general plugin. ``-cc.mode=2
-cc.backend=graphopt.integrations.vllm.backend`` hands every worker's graph to graphopt.
"""

from __future__ import annotations

from typing import Any

__all__ = ["backend", "register"]


def register() -> None:
    """Make graphopt known to vLLM; runs in each of its processes, perhaps twice."""
    from graphopt.integrations.vllm.attention import override

    override()


def __getattr__(name: str) -> Any:
    """Make ``backend`` when vLLM asks for it: while it builds the model.

    So a mistake in the config ends the start before weights are read, and weights that
    passes read stay where passes can read them.
    """
    if name != "backend":
        raise AttributeError(f"module '{__name__}' has no attribute '{name}'")
    from graphopt.integrations.vllm.compiling import make_backend

    return make_backend()
