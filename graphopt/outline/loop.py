"""Compile a graph with a loop: what is before, the body, and what is behind it."""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from graphopt.errors import PassError
from graphopt.ir.loops import ChunkLoop, find_loop, loop_of, order_of
from graphopt.outline.pieces import Piece, extract
from graphopt.outline.program import (
    CompileOne,
    DataSizeError,
    Outlined,
    compile_kinds,
    compile_outlined,
    emit,
    size_inputs,
)
from graphopt.outline.segments import operator_nodes
from graphopt.outline.tasks import compile_tasks
from graphopt.remarks import Remark, missed
from graphopt.runtime.schedule.loop import LoopScheduler

Tell = Callable[[Remark], None]
_KEY = "loop"


def compile_loop(
    gm: fx.GraphModule,
    compile_one: CompileOne,
    outline: int,
    tell: Tell = lambda remark: None,
    cuda_graphs: bool = False,
) -> Outlined:
    """Compile ``gm``, which calls a loop; ``outline`` layers of its body to a piece.

    Chunks that have an order of their own are compiled by op groups instead, and
    ``tell`` is given the remarks of what their runs find; not with ``cuda_graphs``.
    Returns what outlining did in the body, with the whole graph's ``run``.
    """
    call = find_loop(gm)
    loop = None if call is None else loop_of(call)
    assert call is not None and loop is not None
    body = _compile_tasks(loop, compile_one, tell, cuda_graphs)
    if body is None:
        body = _compile_body(loop, compile_one, outline)
        loop.compiled = body.run
    nodes = operator_nodes(gm.graph)
    start = nodes.index(call)
    items = [n for n in nodes[start + 1 :] if n.args and n.args[0] is call]
    behind = [n for n in nodes[start + 1 :] if n not in items]
    symbols = size_inputs(gm)
    before = extract(gm, nodes[:start], symbols)
    arguments = tuple(n for n in call.args if isinstance(n, fx.Node))
    middle = Piece(gm, arguments, tuple(items), _KEY, ())
    after = extract(gm, behind, symbols)
    compiled = compile_kinds([before, after], compile_one)
    source, run = emit(gm, [before, middle, after], {**compiled, _KEY: loop})
    return Outlined(run, body.layers, body.kinds, body.reason, source)


def _compile_tasks(
    loop: ChunkLoop, compile_one: CompileOne, tell: Tell, cuda_graphs: bool
) -> Outlined | None:
    """Let a scheduler run the chunks, where one is asked for and they can be cut."""
    order = order_of(loop.body)
    device = loop.states[0].device
    if order is None:
        return None
    if refusal := _refusal(device.type, cuda_graphs):
        tell(missed("chunks", *refusal))
        return None
    try:
        found = compile_tasks(loop.body, compile_one)
    except (PassError, DataSizeError) as error:
        # What a later pass put into the body, or what its code assumes of sizes.
        tell(missed("chunks", "not-cut", f"chunks run in order: {error}"))
        return None
    loop.scheduler = LoopScheduler(found.program, order, device, tell)
    return Outlined(loop.scheduler, found.layers, found.kinds, source=found.source)


def _refusal(device: str, cuda_graphs: bool) -> tuple[str, str] | None:
    if device not in ("cpu", "cuda"):
        return "device", f"chunks run in order: on '{device}' nothing runs tasks"
    if cuda_graphs and device == "cuda":
        text = "chunks run in order: CUDA graphs share memory that one stream guards"
        return "cuda-graphs", text
    return None


def _compile_body(loop: ChunkLoop, compile_one: CompileOne, outline: int) -> Outlined:
    body = loop.body
    if outline:
        outlined = compile_outlined(body, compile_one, outline)
        if outlined.run is not None:
            return outlined
    else:
        outlined = Outlined(None, reason="switched off by outline = False")
    whole = extract(body, operator_nodes(body.graph), size_inputs(body))
    source, run = emit(body, [whole], compile_kinds([whole], compile_one))
    return Outlined(run, reason=outlined.reason, source=source)
