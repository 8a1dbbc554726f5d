"""Compile a graph with a loop: what is before, the body, and what is behind it."""

from __future__ import annotations

from torch import fx

from graphopt.ir.loops import ChunkLoop, find_loop, loop_of
from graphopt.outline.pieces import Piece, extract
from graphopt.outline.program import (
    CompileOne,
    Outlined,
    compile_kinds,
    compile_outlined,
    emit,
    size_inputs,
)
from graphopt.outline.segments import operator_nodes

_KEY = "loop"


def compile_loop(
    gm: fx.GraphModule, compile_one: CompileOne, outline: bool
) -> Outlined:
    """Compile ``gm``, which calls a loop; ``outline`` its body layer by layer.

    Returns what outlining did in the body, with the whole graph's ``run``.
    """
    call = find_loop(gm)
    loop = None if call is None else loop_of(call)
    assert call is not None and loop is not None
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


def _compile_body(loop: ChunkLoop, compile_one: CompileOne, outline: bool) -> Outlined:
    body = loop.body
    if outline:
        outlined = compile_outlined(body, compile_one)
        if outlined.run is not None:
            return outlined
    else:
        outlined = Outlined(None, reason="switched off by outline = False")
    whole = extract(body, operator_nodes(body.graph), size_inputs(body))
    source, run = emit(body, [whole], compile_kinds([whole], compile_one))
    return Outlined(run, reason=outlined.reason, source=source)
