"""Which numbers of a graph may mean tokens."""

from __future__ import annotations

from torch import fx

from graphopt.ir.match import is_mutating, is_own, op_name, shape_of, value_of
from graphopt.ir.sizes.equations import SizeEquations
from graphopt.ir.sizes.slots import TOKENS, LiteralReadings, Reading, leaves


def numbers_of(gm: fx.GraphModule) -> set[int]:
    """Return the sizes and the integer literals of ``gm``."""
    found: set[int] = set()
    for node in gm.graph.nodes:
        found.update(s for s in shape_of(node) or () if isinstance(s, int))
        found.update(abs(leaf) for leaf in leaves(node) if type(leaf) is int)
    return found


def literal_readings(
    node: fx.Node, literals: LiteralReadings
) -> dict[int, tuple[Reading, ...]]:
    """Return the leaves of ``node`` that may mean tokens, with their readings.

    Numbers of graphopt's own ops are windows and the like, put there by a pass.
    """
    if is_own(node):
        return {}
    found = {i: literals.of(leaf) for i, leaf in enumerate(leaves(node))}
    return {i: readings for i, readings in found.items() if len(readings) > 1}


def is_inferred(node: fx.Node) -> bool:
    """Tell whether ``node`` has or writes a value; the rest acts on global state."""
    called = node.op in ("call_function", "call_method")
    return called and (value_of(node) is not None or is_mutating(node))


def is_factor(equations: SizeEquations, number: int) -> bool:
    """Tell whether only multiples of T compete with a number that is a mere value.

    A window of 4096 is not eight times the 512 tokens: what counts T times heads or
    batch is a size, and a size shows.
    """
    exprs = [reading.expr for reading in equations.possible(number)]
    factors = [abs(e.coeff(TOKENS)) for e in exprs if e.has(TOKENS)]
    multiple = bool(factors) and min(factors) > 1
    name = op_name(equations.unknowns[number].node)
    sliced = name in ("getitem", "narrow", "placeholder")
    return multiple and equations.is_inert(number) and not sliced
