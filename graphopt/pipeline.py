"""Run a pipeline of passes over a graph: each one timed, verified, diffed, remarked."""

from __future__ import annotations

import hashlib
import time
import traceback
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from torch import fx

from graphopt.config_text import print_text
from graphopt.errors import PassError
from graphopt.ir.collectives import count_collectives
from graphopt.ir.copying import copy_graph
from graphopt.ir.dce import eliminate_dead_code
from graphopt.ir.loops import innermost
from graphopt.ir.model_graph import ModelGraph
from graphopt.ir.text import graph_text
from graphopt.passes.base import Pass, PassContext, PassResult
from graphopt.remarks import Remark, failure, missed
from graphopt.reproducer import write_reproducer
from graphopt.verify import check_collectives, check_structure, signature


@dataclass(frozen=True)
class PassRecord:
    """What one pass did to one graph; ``before`` and ``after`` are normalised text."""

    name: str
    text: str
    seconds: float
    changed: bool
    remarks: tuple[Remark, ...] = ()
    statistics: dict[str, int] = field(default_factory=dict)
    before: str = ""
    after: str = ""


@dataclass(frozen=True)
class PipelineOptions:
    """How to run: ``verify`` is off, structure or numeric; ``strict`` raises.

    ``reproducers`` is the folder for the files that repeat a failure; None writes none.
    """

    verify: str = "structure"
    strict: bool = False
    reproducers: Path | None = None
    context: PassContext = field(default_factory=PassContext)


def run_passes(
    gm: fx.GraphModule, passes: Sequence[Pass], options: PipelineOptions | None = None
) -> list[PassRecord]:
    """Run ``passes`` in order over ``gm``, in place; return one record a pass.

    A pass that raises or breaks the graph is undone and leaves a ``failure`` remark;
    in strict mode PassError is raised instead, with the graph as before that pass. Once
    the layers are in a loop, passes rewrite its body.
    """
    options = options or PipelineOptions()
    records: list[PassRecord] = []
    text = ""
    for item in passes:
        text = text or graph_text(gm)
        record = _run_one(gm, item, options, text)
        records.append(record)
        body = innermost(gm)
        gm, text = body, record.after if body is gm else ""
    return records


def _run_one(
    gm: fx.GraphModule, item: Pass, options: PipelineOptions, before: str
) -> PassRecord:
    saved = copy_graph(gm.graph)
    start = time.perf_counter()
    try:
        result = _edit(gm, item, options)
    except Exception as error:
        gm.graph = saved
        repeat = _reproduce(gm.graph, item, options, before, error)
        if options.strict:
            raise PassError(f"pass {item.name} failed: {error}{repeat}") from error
        result = _failed(error, repeat)
    seconds = time.perf_counter() - start
    remarks = _complete(item, result)
    after = graph_text(gm) if result.changed else before
    failed = next((r for r in remarks if r.kind == "failure"), None)
    if options.strict and failed is not None:
        gm.graph = saved
        raise PassError(str(failed))
    return PassRecord(
        name=item.name,
        text=print_text(item.name, item.options()),
        seconds=seconds,
        changed=result.changed,
        remarks=remarks,
        statistics=result.statistics,
        before=before,
        after=after,
    )


def _edit(gm: fx.GraphModule, item: Pass, options: PipelineOptions) -> PassResult:
    known, outputs, exchanges = (
        set(gm.graph.nodes),
        signature(gm),
        count_collectives(gm),
    )
    if exchanges and (reason := _needs_all_ranks(item)):
        return PassResult(False, (missed("graph", "sharded", reason),))
    result = item.run(ModelGraph(gm), options.context)
    if result.changed:
        eliminate_dead_code(gm)
        if options.verify != "off":
            check_structure(gm, outputs, known)
        check_collectives(gm, exchanges)
    return result


def _needs_all_ranks(item: Pass) -> str:
    if item.selects_over == "nothing" or item.asks_ranks:
        return ""
    if item.selects_over == "durations":
        return "it chooses by durations, which differ from rank to rank"
    return f"it chooses over {item.selects_over}, of which each rank has only a part"


def _failed(error: Exception, repeat: str) -> PassResult:
    return PassResult(False, (failure("undone", _describe(error) + repeat),))


def _describe(error: Exception) -> str:
    where = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__}: {error} (at {where.name}, line {where.lineno})"


def _reproduce(
    graph: fx.Graph, item: Pass, options: PipelineOptions, before: str, error: Exception
) -> str:
    """Write the file that repeats the failure; return the end of a message."""
    if options.reproducers is None:
        return ""
    text = print_text(item.name, item.options())
    name = f"{item.name}-{hashlib.sha256((before + text).encode()).hexdigest()[:12]}"
    try:
        path = write_reproducer(
            options.reproducers, name, graph, text, _describe(error)
        )
    except (OSError, ValueError) as reason:
        return f"; no reproducer: {reason}"
    return f"; to repeat it: python {path}"


def _complete(item: Pass, result: PassResult) -> tuple[Remark, ...]:
    """Name the pass in its remarks, and report no match or an unexpected number."""
    remarks = list(result.remarks)
    count = sum(r.kind == "applied" for r in remarks)
    if not remarks:
        remarks.append(missed("graph", "no-sites", "the graph has no site for it"))
    if item.expect is not None and count != item.expect:
        message = f"expected {item.expect} rewritten sites, got {count}"
        remarks.append(failure("expect", message))
    return tuple(replace(r, pass_name=item.name) for r in remarks)
