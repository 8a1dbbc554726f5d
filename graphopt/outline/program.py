"""Compile each kind of piece once and run the pieces in order."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import sympy
from torch import SymInt, fx

from graphopt._compat import is_data_symbol, isolated_tracing
from graphopt.outline.fresh import FreshSizes, SizeCheck, depends_on_data
from graphopt.outline.guards import guard_alike, new_guards, shape_environment
from graphopt.outline.lookups import Lookup, find_lookups
from graphopt.outline.pieces import Piece, extract
from graphopt.outline.segments import find_layers, operator_nodes, target_name

Compiled = Callable[..., Sequence[Any]]
CompileOne = Callable[[fx.GraphModule, list[Any]], Compiled]

_STATE_CHANGES = ("set_grad_enabled", "_enter_autocast", "_exit_autocast", "inference")


@dataclass(frozen=True)
class Outlined:
    """What outlining did: ``layers`` run through ``kinds`` compiled pieces."""

    run: Compiled | None
    layers: int = 0
    kinds: int = 0
    reason: str = ""
    source: str = field(default="", repr=False)


def compile_outlined(
    gm: fx.GraphModule, compile_one: CompileOne, together: int = 1
) -> Outlined:
    """Compile ``gm`` by pieces, or return why not (``run`` is None then).

    A piece has ``together`` layers: more take longer to compile and less to call.
    ``compile_one(module, example_inputs)`` returns a callable that takes the inputs and
    gives a sequence of outputs. Results are those of the whole graph: each piece is the
    very operators, in the order of the graph.
    """
    layers = find_layers(gm.graph)
    if not layers:
        return Outlined(None, reason="fewer than three repeated layers were found")
    nodes = operator_nodes(gm.graph)
    if reason := _state_crosses(nodes, layers):
        return Outlined(None, reason=reason)
    parts = [
        (layers[i][0], layers[min(i + together, len(layers)) - 1][1])
        for i in range(0, len(layers), together)
    ]
    lookups = find_lookups(nodes[: layers[0][0]])
    pieces = _cut(gm, nodes, parts, {n for look in lookups for n in look.nodes})
    kinds = len({piece.key for piece in pieces[1:-1]})
    if kinds * 2 > len(parts):
        what = "layers" if together == 1 else f"pieces of {together} layers"
        text = f"{len(parts)} {what} are of {kinds} kinds, too few repeat"
        return Outlined(None, len(layers), kinds, text)
    try:
        compiled = compile_kinds(pieces, compile_one)
    except DataSizeError as error:
        return Outlined(None, len(layers), kinds, str(error))
    source, run = emit(gm, pieces, compiled, lookups)
    return Outlined(run, len(layers), kinds, source=source)


def _cut(
    gm: fx.GraphModule,
    nodes: list[fx.Node],
    layers: list[tuple[int, int]],
    looked_up: set[fx.Node],
) -> list[Piece]:
    symbols = size_inputs(gm)
    first = [node for node in nodes[: layers[0][0]] if node not in looked_up]
    bounds = [*layers, (layers[-1][1], len(nodes))]
    parts = [first, *(nodes[start:end] for start, end in bounds)]
    return [extract(gm, part, symbols) for part in parts]


def size_inputs(gm: fx.GraphModule) -> list[fx.Node]:
    """Return the inputs of ``gm`` that are symbolic sizes."""
    inputs = gm.graph.find_nodes(op="placeholder")
    return [n for n in inputs if isinstance(n.meta.get("example_value"), SymInt)]


def _state_crosses(nodes: list[fx.Node], layers: list[tuple[int, int]]) -> str:
    """Autocast or grad-mode switches would not reach from one piece into the next."""
    for node in nodes[layers[0][0] : layers[-1][1]]:
        if any(name in target_name(node) for name in _STATE_CHANGES):
            return f"{target_name(node)} inside the layers changes global state"
    return ""


def compile_kinds(
    pieces: Sequence[Piece], compile_one: CompileOne
) -> dict[str, Compiled]:
    """Compile the first piece of each kind; what it assumes of sizes holds for all."""
    compiled: dict[str, Compiled] = {}
    guarded: dict[str, tuple[Piece, list[Any]]] = {}
    environment = shape_environment(pieces[0].module)
    for piece in pieces:
        if not piece.outputs:
            continue
        if piece.key in compiled:
            first, guards = guarded[piece.key]
            names = dict(zip(first.symbols, piece.symbols, strict=True))
            guard_alike(environment, guards, names)
            continue
        compiled[piece.key], guards = _compile_kind(piece, environment, compile_one)
        guarded[piece.key] = (piece, guards)
    return compiled


def _compile_kind(
    piece: Piece, environment: Any, compile_one: CompileOne
) -> tuple[Compiled, list[Any]]:
    """Return the code of ``piece``, and what it assumes of sizes at hand.

    What it assumes of sizes that depend on data is checked at each call. Raises
    DataSizeError where it would be for one such size only.
    """
    examples = [n.meta.get("example_value") for n in piece.inputs]
    if not depends_on_data(examples):
        with isolated_tracing(), new_guards(environment) as guards:
            return compile_one(piece.module, examples), guards
    fresh = FreshSizes(examples)
    with isolated_tracing(fresh.mode):
        code = compile_one(piece.module, fresh.inputs)
    found = fresh.guards()
    by_data = [g for g in found if any(map(is_data_symbol, g.free_symbols))]
    guards = [guard for guard in found if guard not in by_data]
    for guard in guards:
        environment.evaluate_expr(guard)
    return _checked(code, by_data, examples), guards


def _checked(code: Compiled, guards: Sequence[Any], examples: Sequence[Any]) -> Any:
    """Return ``code`` that checks ``guards`` on the sizes of its arguments first."""
    if any(isinstance(guard, (sympy.Eq, sympy.Ne)) for guard in guards):
        raise DataSizeError(f"a layer's code holds only where {guards}")
    if not guards:
        return code
    checks = [SizeCheck(guard, examples) for guard in guards]

    def run(*arguments: Any) -> Any:
        for check in checks:
            check(arguments)
        return code(*arguments)

    return run


class DataSizeError(Exception):
    """The code of a piece would hold for some sizes only, and these depend on data."""


def emit(
    gm: fx.GraphModule,
    pieces: Sequence[Piece],
    compiled: dict[str, Compiled],
    lookups: Sequence[Lookup] = (),
) -> tuple[str, Compiled]:
    """Print the program that calls the pieces; values are dropped after last use."""
    output = next(n for n in gm.graph.nodes if n.op == "output")
    placeholders = [n for n in gm.graph.nodes if n.op == "placeholder"]
    names = {key: f"piece{i}" for i, key in enumerate(compiled)}
    last = {n: i for i, piece in enumerate(pieces) for n in piece.inputs}
    kept = set(output.all_input_nodes)
    lines = [f"def run({', '.join(n.name for n in placeholders)}):"]
    scope: dict[str, Any] = {names[key]: fn for key, fn in compiled.items()}
    for i, look in enumerate(lookups):
        scope[f"lookup{i}"] = look.function
        arguments = ", ".join(_result(value) for value in look.node.args)
        lines.append(f"    ({look.targets()}) = lookup{i}({arguments})")
    for i, piece in enumerate(pieces):
        if not piece.outputs:
            continue
        targets = ", ".join(n.name for n in piece.outputs)
        arguments = ", ".join(n.name for n in piece.inputs)
        lines.append(f"    ({targets},) = {names[piece.key]}({arguments})")
        dead = [n.name for n in last if last[n] == i and n not in kept]
        if dead:
            lines.append(f"    del {', '.join(dead)}")
    lines.append(f"    return {_result(output.args[0])}")
    source = "\n".join(lines) + "\n"
    exec(compile(source, "<graphopt outlined layers>", "exec"), scope)
    return source, scope["run"]


def _result(value: Any) -> str:
    if isinstance(value, fx.Node):
        return value.name
    if isinstance(value, (tuple, list)):
        return "(" + "".join(_result(v) + ", " for v in value) + ")"
    return repr(value)
