"""Compile the body of a chunk loop by op groups, to be run in any order of chunks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt import _compat
from graphopt.ir.op_groups import OpGroup, op_groups
from graphopt.outline.pieces import Piece, extract
from graphopt.outline.program import Compiled, CompileOne, compile_kinds, size_inputs
from graphopt.runtime.schedule.dag import Group
from graphopt.runtime.schedule.program import TaskProgram


@dataclass(frozen=True)
class CompiledTasks:
    """The program, of how many layers and compiled kinds of groups, and its text."""

    program: TaskProgram
    layers: int
    kinds: int
    source: str


def compile_tasks(body: fx.GraphModule, compile_one: CompileOne) -> CompiledTasks:
    """Compile each kind of op group of ``body`` once.

    Raises PassError for a body that has no op groups. The code takes as many threads
    as the thread has that runs it. Keys and values are written between the groups and
    not in one: code that is traced may write to a copy of all tokens and copy it back,
    over what another chunk has written meanwhile.
    """
    groups = op_groups(body)
    symbols = size_inputs(body)
    pieces = [extract(body, group.nodes, symbols) for group in groups]
    with _compat.any_number_of_threads():
        compiled = compile_kinds(pieces, compile_one)
    source, start = _emit(body, groups, pieces, compiled)
    program = TaskProgram(
        tuple(Group(g.layer, g.name, g.dynamic) for g in groups), start
    )
    layers = 1 + max(group.layer for group in groups)
    return CompiledTasks(program, layers, len(compiled), source)


def _emit(
    body: fx.GraphModule,
    groups: Sequence[OpGroup],
    pieces: Sequence[Piece],
    compiled: dict[str, Compiled],
) -> tuple[str, Any]:
    """Print the generator that runs a group a step; values go after their last use."""
    graph = body.graph
    names = {key: f"piece{i}" for i, key in enumerate(compiled)}
    reads = [_reads(g, p) for g, p in zip(groups, pieces, strict=True)]
    outputs = list(next(n for n in graph.nodes if n.op == "output").args[0])
    reads.append([n for n in outputs if isinstance(n, fx.Node)])
    last = {node: i for i, read in enumerate(reads) for node in read}
    inputs = graph.find_nodes(op="placeholder")
    lines = [f"def start({', '.join(n.name for n in inputs)}):"]
    for i, (group, piece) in enumerate(zip(groups, pieces, strict=True)):
        if piece.outputs:
            call = f"{names[piece.key]}({_listed(piece.inputs)})"
            lines.append(f"    {_listed(piece.outputs)} = {call}")
        lines += [f"    append({_arguments(node)})" for node in group.writes]
        made = [*reads[i], *piece.outputs, *(inputs if i == 0 else ())]
        dead = [n.name for n in dict.fromkeys(made) if last.get(n, -1) <= i]
        lines += [f"    del {', '.join(dead)}"] if dead else []
        lines.append(f"    yield ({_listed(reads[i + 1])})")
    source = "\n".join(lines) + "\n"
    scope: dict[str, Any] = {names[key]: fn for key, fn in compiled.items()}
    scope["append"] = torch.ops.graphopt.append_rows.default
    exec(compile(source, "<graphopt tasks of a chunk>", "exec"), scope)
    return source, scope["start"]


def _reads(group: OpGroup, piece: Piece) -> list[fx.Node]:
    """Return what the group takes from before it."""
    inside = set(group.nodes)
    written = [n for w in group.writes for n in w.all_input_nodes if n not in inside]
    return list(dict.fromkeys([*piece.inputs, *written]))


def _listed(nodes: Sequence[fx.Node]) -> str:
    return "".join(f"{node.name}, " for node in nodes)


def _arguments(write: fx.Node) -> str:
    return ", ".join(str(argument) for argument in write.args)
