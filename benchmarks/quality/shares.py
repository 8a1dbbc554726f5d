"""The share of a run that some operators of a captured graph take."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection
from typing import Any

from torch import fx

from graphopt.ir.match import op_name
from graphopt.search.runner import Edit


class OpTimes:
    """An edit of a graph after which calls of ``names`` are timed, wall seconds."""

    def __init__(self, edit: Edit, names: Collection[str]) -> None:
        self._edit, self._names = edit, names
        self.seconds = 0.0
        self.calls = 0

    def edit(self, gm: fx.GraphModule) -> None:
        """Make the edit and put a clock around the operators.

        Raises ValueError where the edited graph has none of them.
        """
        self._edit(gm)
        nodes = [n for n in gm.graph.nodes if op_name(n) in self._names]
        if not nodes:
            raise ValueError(f"no {', '.join(self._names)} in the graph")
        for node in nodes:
            node.target = self._timed(node.target)

    def share(self, run: Callable[[], object]) -> float:
        """Return the operators' seconds over those of ``run``."""
        self.seconds, start = 0.0, time.perf_counter()
        self.calls = 0
        run()
        return self.seconds / (time.perf_counter() - start)

    def _timed(self, target: Any) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            start = time.perf_counter()
            result = target(*arguments)
            self.seconds += time.perf_counter() - start
            self.calls += 1
            return result

        return call
