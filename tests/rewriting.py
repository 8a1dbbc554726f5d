"""Models that run rewritten graphs without Inductor, which takes most of a minute."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import fx

from graphopt.backend import rewrite
from graphopt.distributed import localise
from graphopt.options import parse_options
from graphopt.outline import compile_outlined
from graphopt.report import CompileReport

Host = Callable[[fx.GraphModule, list[Any]], Callable[..., Any]]


def traced(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """What Inductor gets: traced and functionalised, forward and backward apart."""
    return torch._dynamo.lookup_backend("aot_eager")(gm, inputs)


def by_pieces(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """`traced`, layer by layer where layers repeat."""
    return compile_outlined(gm, traced).run or traced(gm, inputs)


def inductor(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
    """The whole graph by Inductor."""
    return torch._dynamo.lookup_backend("inductor")(gm, inputs)


def rewritten(
    model: Any,
    config: str,
    around: AbstractContextManager[Any] | None = None,
    host: Host = lambda gm, _: gm,
    dynamic: bool | None = True,
    reports: list[CompileReport] | None = None,
    copied: bool = True,
) -> Any:
    """Return a twin of ``model`` whose graphs are what the passes of ``config`` made.

    ``around`` is entered for each run of a graph. ``host`` compiles the graphs, which
    run as they are without one. ``reports`` gets a report for each graph. Without
    ``copied`` it is ``model`` itself that is rewritten: part of a mesh of processes.
    """

    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Any:
        local = localise(gm, inputs)
        report, _ = rewrite(gm, parse_options({"config": config}))
        report.remarks += [] if local.remark is None else [local.remark]
        if reports is not None:
            reports.append(report)
        compiled = host(gm, local.inputs)

        def run(*args: Any) -> Any:
            with around or nullcontext():
                return compiled(*local.arguments(args))

        return run

    torch._dynamo.reset()  # else the limit of recompilations leaves it as it was
    twin = copy.deepcopy(model) if copied else model
    twin.compile(backend=backend, dynamic=dynamic)
    return twin
