"""Read an attention mask's graph back as (pattern, offset, window, key mask)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import sympy
import torch
from torch import fx

from graphopt.ir.masks.index_expr import Evaluator
from graphopt.ir.masks.values import (
    BATCH,
    KEY,
    QUERY,
    J,
    Load,
    UnknownOperatorError,
    visible,
)
from graphopt.ir.match import at_least_zero, shape_of, size_expr, value_of


@dataclass(frozen=True)
class MaskForm:
    """What a mask means: query row r is at key position r + ``offset`` and sees key k
    when ``k <= r + offset`` (causal), ``k > r + offset - window``, and ``key_mask``.

    ``pattern`` is full, causal or sliding-window; ``key_mask`` a bool [B|1, >= Skv]
    node, of which column ``key_start`` speaks of key 0.
    ``finite`` masks hide with a dtype's lowest number, not minus infinity: softmax of
    a row without any visible key is then its mean value, not NaN or zero.
    """

    pattern: str
    offset: Any = sympy.S.Zero
    window: int = 0
    key_mask: fx.Node | None = None
    finite: bool = False
    key_start: Any = sympy.S.Zero


class UnknownMaskError(ValueError):
    """The mask is not one of the known forms; the message says why."""


def read_mask(
    mask: fx.Node, evaluator: Evaluator, *, one_query: bool = False
) -> MaskForm:
    """Return the form of a bool or additive float mask [B|1, H|1, Sq, Skv].

    ``one_query`` says that Sq is 1 (decode): the only row is row 0.
    Raises UnknownMaskError for biases, masks that are data, and anything else that is
    not a conjunction of the known conditions.
    """
    value = evaluator.tensor(mask)
    if value is None:
        raise UnknownMaskError("the mask is no tensor")
    try:
        shown, finite = visible(value.expr)
    except UnknownOperatorError as error:
        raise UnknownMaskError(f"{error}{_why(evaluator, value.expr)}") from None
    reader = _Reader(evaluator, sympy.S.Zero if one_query else QUERY)
    for part in _conjuncts(shown):
        reader.take(part)
    return replace(reader.form(), finite=finite, key_start=reader.key_start)


def _why(evaluator: Evaluator, expr: Any) -> str:
    """Say which operators of ``expr`` were not understood."""
    places = {int(load.args[0]) for load in expr.atoms(Load)}
    reasons = [evaluator.reasons[place] for place in sorted(places)]
    known = [reason for reason in reasons if reason]
    return f" ({_short('; '.join(known))})" if known else ""


def _conjuncts(expr: Any) -> list[Any]:
    if expr == sympy.true:
        return []
    if isinstance(expr, sympy.Not) and isinstance(expr.args[0], sympy.Or):
        return [c for a in expr.args[0].args for c in _conjuncts(sympy.Not(a))]
    if isinstance(expr, sympy.And):
        return [c for a in expr.args for c in _conjuncts(a)]
    return [expr]


class _Reader:
    """Collects the conjuncts of one mask."""

    def __init__(self, evaluator: Evaluator, query: Any) -> None:
        self.evaluator = evaluator
        self.query = query
        self.upper: list[Any] = []
        self.lower: list[Any] = []
        self.key_mask: fx.Node | None = None
        self.key_start: Any = sympy.S.Zero

    def take(self, part: Any) -> None:
        if isinstance(part, (sympy.Ge, sympy.Gt, sympy.Le, sympy.Lt)):
            self._take_bound(part)
        elif part.has(Load):
            self._take_load(part)
        else:
            raise UnknownMaskError(f"the condition {part}")

    def _take_bound(self, part: Any) -> None:
        """Bring ``left <= right`` to a bound on k - r."""
        less = isinstance(part, (sympy.Le, sympy.Lt))
        left, right = (part.lhs, part.rhs) if less else (part.rhs, part.lhs)
        slack = sympy.expand(right - left)  # at least 0, or at least 1 when strict
        if isinstance(part, (sympy.Lt, sympy.Gt)):
            slack -= 1
        if slack.has(Load):
            raise UnknownMaskError("positions are data")
        along_key = sympy.diff(slack, KEY)
        rest = sympy.expand(slack - along_key * (KEY - self.query))
        if along_key not in (1, -1) or rest.free_symbols & set(J):
            raise UnknownMaskError(f"the condition {part}")
        if along_key == -1:  # rest - (k - r) >= 0
            self.upper.append(rest)
        else:  # (k - r) + rest >= 0
            self.lower.append(-rest)

    def _take_load(self, part: Any) -> None:
        if not isinstance(part, sympy.Ne) or not isinstance(part.lhs, Load):
            why = _why(self.evaluator, part)
            raise UnknownMaskError(f"data in the condition {_short(part)}{why}")
        number, *indices = part.lhs.args
        node = self.evaluator.loads[int(number)]
        shape = shape_of(node) or ()
        one_row = len(indices) == 2 and size_expr(shape[0]) == 1
        row = sympy.S.Zero if one_row else BATCH
        start = sympy.expand(indices[-1] - KEY)
        at_key = not start.free_symbols & set(J) and at_least_zero(start)
        if indices[:-1] != [row] or not at_key or start.has(Load):
            why = _why(self.evaluator, part)
            raise UnknownMaskError(f"the mask is data: {node.name} at {indices}{why}")
        if value_of(node).dtype != torch.bool or self.key_mask is not None:
            raise UnknownMaskError("more than one key mask, or one that is not bool")
        if self.evaluator.aliases.is_written(node):
            raise UnknownMaskError(f"{node.name} is written in place")
        self.key_mask, self.key_start = node, start

    def form(self) -> MaskForm:
        """Return what the conjuncts amount to."""
        if not self.upper and not self.lower:
            return MaskForm("full", key_mask=self.key_mask)
        if len(set(self.upper)) != 1 or len(set(self.lower)) > 1:
            raise UnknownMaskError(
                "several causal or window conditions, or a window without a causal one"
            )
        offset = self.upper[0]
        if not self.lower:
            return MaskForm("causal", offset, key_mask=self.key_mask)
        window = sympy.simplify(offset - self.lower[0] + 1)
        if not window.is_Integer or window <= 0:
            raise UnknownMaskError(f"a window of {window} tokens")
        return MaskForm("sliding-window", offset, int(window), self.key_mask)


def _short(expr: Any) -> str:
    text = str(expr)
    return text if len(text) < 80 else text[:77] + "..."
