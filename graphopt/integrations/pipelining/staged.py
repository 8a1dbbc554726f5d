"""A model of which this process runs some stages: captured whole, compiled in part."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.exc import BackendCompilerFailed

from graphopt.backend import rewrite
from graphopt.distributed import localise
from graphopt.errors import GraphoptError
from graphopt.integrations.pipelining.cut import cut, mark_stages
from graphopt.integrations.pipelining.hosts import HOSTS
from graphopt.integrations.pipelining.program import Probe, Program, release
from graphopt.ir.constants import fold_float_attributes
from graphopt.ir.dce import eliminate_dead_code
from graphopt.ir.sizes.inputs import tie_sizes
from graphopt.options import parse_options
from graphopt.report import CompileReport

Check = Callable[[CompileReport], None]


@dataclass
class _Link:
    """What the running call exchanges with the schedule."""

    stage: int = 0
    received: tuple[Tensor, ...] = ()
    sent: tuple[Tensor, ...] = ()
    probe: bool = False


class _ProbedError(Exception):
    """Leaves a call as soon as its graph and arguments are known."""

    def __init__(self, probe: Probe) -> None:
        super().__init__()
        self.probe = probe


class StagedModel:
    """Runs stages of ``step``, a module whose call Dynamo captures in one graph.

    Every process captures and rewrites the whole graph, so that passes see the layers
    that they see in one process, by the same numbers; it compiles the stages ``own``.
    ``check`` may refuse a report; ``layers`` is how many the caches were divided for.

    A call runs one stage: results that others compute are None in it.
    """

    def __init__(
        self,
        step: nn.Module,
        stages: int,
        own: Iterable[int],
        options: dict[str, Any],
        host: str = "inductor",
        check: Check | None = None,
        layers: int | None = None,
    ) -> None:
        self.step, self.stages, self.own = step, stages, tuple(own)
        self.options = parse_options(options)
        self.reports: list[CompileReport] = []
        self._host, self._check, self._layers = HOSTS[host], check, layers
        self._link = _Link()
        self._programs: list[Program] = []
        self._call: Any = torch.compile(
            step, backend=self._backend, dynamic=True, fullgraph=True
        )

    def __call__(
        self, stage: int, received: Sequence[Tensor], *args: Any, **kwargs: Any
    ) -> tuple[tuple[Tensor, ...], Any]:
        """Run one stage; return what it sends on, and the results of the call."""
        self._link = _Link(stage, tuple(received))
        result = self._enter(*args, **kwargs)
        return self._link.sent, result

    def probe(self, *args: Any, **kwargs: Any) -> Probe:
        """Compile for a call and tell what it exchanges, without running anything."""
        self._link = _Link(probe=True)
        try:
            self._enter(*args, **kwargs)
        except _ProbedError as found:
            return found.probe
        raise AssertionError("the call was not compiled")

    def release(self) -> int:
        """Free the weights that no stage of this process reads; return the bytes.

        To be called when everything is compiled: a pass that reads the values of
        weights reads those of all layers.
        """
        return release(self._programs)

    @torch.no_grad()
    def _enter(self, *args: Any, **kwargs: Any) -> Any:
        limit = torch._dynamo.config.patch(recompile_limit=64)
        try:
            with limit:
                return self._call(*args, **kwargs)
        except BackendCompilerFailed as error:
            if isinstance(error.inner_exception, GraphoptError):
                raise error.inner_exception from None
            raise

    def _backend(self, gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        local = localise(gm, inputs)
        fold_float_attributes(gm)
        eliminate_dead_code(gm)
        tie_sizes(gm)
        mark_stages(gm, self.stages, self._layers)
        report, _ = rewrite(gm, self.options)
        report.remarks += [] if local.remark is None else [local.remark]
        self.reports.append(report)
        if self._check is not None:
            self._check(report)
        parts = cut(gm, self.stages)
        code = {
            stage: self._host(parts[stage].module, self.options, report)
            for stage in self.own
        }
        program = Program.of(gm, parts, code)
        self._programs.append(program)

        def run(*given: Any) -> tuple[Any, ...]:
            program.note(given)
            return self._run(program, local.arguments(given))

        return run

    def _run(self, program: Program, arguments: Sequence[Any]) -> tuple[Any, ...]:
        link = self._link
        if link.probe:
            raise _ProbedError(program.probe(arguments))
        part = program.parts[link.stage]
        given = (arguments[place] for place in part.inputs)
        found = program.run[link.stage](*given, *link.received)
        count = len(part.sent)
        link.sent = tuple(x.contiguous() for x in found[:count])
        own = found[count:]
        return tuple(None if place is None else own[place] for place in part.results)
