"""Models that run rewritten graphs as they are: Inductor takes most of a minute."""

from __future__ import annotations

import copy
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from graphopt.backend import rewrite
from graphopt.options import parse_options


def rewritten(
    model: Any, config: str, around: AbstractContextManager[Any] | None = None
) -> Any:
    """Return a twin of ``model`` whose graphs are what the passes of ``config`` made.

    ``around`` is entered for each run of a graph.
    """

    def backend(gm: torch.fx.GraphModule, inputs: list[Any]) -> Any:
        rewrite(gm, parse_options({"config": config}))

        def run(*args: Any) -> Any:
            with around or nullcontext():
                return gm(*args)

        return run

    torch._dynamo.reset()  # else the limit of recompilations leaves it as it was
    twin = copy.deepcopy(model)
    twin.compile(backend=backend, dynamic=True)
    return twin
