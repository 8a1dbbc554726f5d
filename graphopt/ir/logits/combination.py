"""Find where logits of several models are added: base + factor (tuned - reference)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from graphopt.ir.casts import CASTS
from graphopt.ir.match import argument, float_of, op_name, value_of
from graphopt.ir.sites.linear import is_linear

COMBINED = "graphopt.combine_logits"
_THROUGH = (*CASTS, "getitem", "contiguous", "clone", "div", "mul", "tanh")
_MAX_STEPS = 12


@dataclass(frozen=True)
class Combination:
    """``node`` = base + sum of factors (tuned - reference).

    ``plain``: spelt in arithmetic, of one pair, with ``factor`` a float or a tensor of
    no dimensions (None is 1); else the operator, with its weights and beta.
    """

    node: fx.Node
    base: fx.Node
    tuned: tuple[fx.Node, ...]
    reference: tuple[fx.Node, ...]
    plain: bool = False
    factor: Any = None

    @property
    def logits(self) -> tuple[fx.Node, ...]:
        """Return the logits of every member, each once."""
        every = (self.base, *self.tuned, *self.reference)
        return tuple(dict.fromkeys(every))


def find_combinations(gm: fx.GraphModule) -> list[Combination]:
    """Return the combinations of ``gm`` in graph order."""
    found = (combination_at(node) for node in gm.graph.nodes)
    return [c for c in found if c is not None]


def head_of(logits: Any) -> fx.Node | None:
    """Return the linear that ``logits`` come from; casts, caps and cuts between."""
    for _ in range(_MAX_STEPS):
        if not isinstance(logits, fx.Node) or is_linear(logits):
            return logits if isinstance(logits, fx.Node) else None
        if op_name(logits) not in _THROUGH or not logits.args:
            return None
        logits = logits.args[0]
    return None


def combination_at(node: fx.Node) -> Combination | None:
    """Return the combination whose result ``node`` is, or None."""
    name = op_name(node)
    if name == COMBINED:
        base, tuned, reference = node.args[:3]
        return Combination(node, base, tuple(tuned), tuple(reference))  # type: ignore
    if name == "add" and len(node.args) == 2 and argument(node, 2, "alpha", 1) == 1:
        return _plain(node)
    return None


def _plain(node: fx.Node) -> Combination | None:
    for base, moved in (node.args, node.args[::-1]):
        for difference, factor in _products(moved):
            if not isinstance(difference, fx.Node) or op_name(difference) != "sub":
                continue
            tuned, reference = difference.args[:2]
            heads = [head_of(part) for part in (base, tuned, reference)]
            if None not in heads and len(set(heads)) >= 2 and _is_factor(factor):
                sides: tuple[Any, Any, Any] = (base, (tuned,), (reference,))
                return Combination(node, *sides, True, factor)
    return None


def _products(node: Any) -> Iterator[tuple[Any, Any]]:
    """Yield (difference, factor) of what may be a product with a factor."""
    yield node, None
    if isinstance(node, fx.Node) and op_name(node) == "mul" and len(node.args) == 2:
        yield node.args
        yield node.args[1], node.args[0]


def _is_factor(factor: Any) -> bool:
    value = value_of(factor)
    scalar = isinstance(value, torch.Tensor) and value.ndim == 0
    return factor is None or scalar or float_of(factor) is not None
