"""What runs the graph of a stage: Inductor, or the rewritten graph as it is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import fx

from graphopt import _compat
from graphopt.backend import compile_rewritten
from graphopt.options import BackendOptions
from graphopt.report import CompileReport

Compiled = Callable[..., Sequence[Any]]
Host = Callable[[fx.GraphModule, BackendOptions, CompileReport], Compiled]


def inductor(
    gm: fx.GraphModule, options: BackendOptions, report: CompileReport
) -> Callable[..., Any]:
    """Compile a stage as the backend does: layer by layer where layers repeat."""
    inputs = gm.graph.find_nodes(op="placeholder")
    examples = [node.meta.get("example_value") for node in inputs]
    with _compat.isolated_tracing():
        return compile_rewritten(gm, examples, options, report)


def traced(
    gm: fx.GraphModule, options: BackendOptions, report: CompileReport
) -> Callable[..., Any]:
    """Run the rewritten graph as it is: to check, and without waiting for Inductor."""
    return gm


HOSTS: dict[str, Host] = {"inductor": inductor, "traced": traced}
