"""Eager attention: matmul, scale, soft cap, mask, softmax, matmul."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import fx

from graphopt.ir.attention.repeats import undo_repeats
from graphopt.ir.attention.site import (
    AttentionSite,
    checked,
    every_row_sees_a_key,
    unwritten,
    with_mask,
)
from graphopt.ir.dce import drops
from graphopt.ir.masks.index_expr import Evaluator
from graphopt.ir.match import argument, float_of, op_name, shape_of, sizes_of, value_of

_CASTS = ("to", "float", "contiguous", "type_as")


def match_eager(softmax: fx.Node, evaluator: Evaluator) -> AttentionSite | None:
    """Return the site around ``softmax``, or None when it is no attention.

    A site that holds more than the op can express (a bias, sinks, dropout) comes back
    with ``unsupported``.
    """
    read = _read(softmax)
    return None if isinstance(read, str) else _site(*read, evaluator)


def why_not(softmax: fx.Node) -> str:
    """Return why `match_eager` does not see attention around ``softmax``."""
    read = _read(softmax)
    return read if isinstance(read, str) else "heads that are no number"


def _read(softmax: fx.Node) -> tuple[_Weights, _Scores] | str:
    """Return what is around ``softmax``, or why it is unknown."""
    rank = len(shape_of(softmax) or ())
    if argument(softmax, 1, "dim") not in (-1, 3) or rank != 4:
        return f"over axis {argument(softmax, 1, 'dim')} of {rank}"
    weights, found = _Weights(), _Scores()
    if not found.read(_skip_casts(softmax.args[0])):
        return f"the scores come from {found.stop}"
    if not weights.read(softmax):
        return f"the weights go to {weights.stop}"
    # A slice of the weights takes the column of the sinks away again, or is unknown.
    if weights.sliced and not found.sinks:
        return "a slice of the weights"
    return weights, found


def _site(
    weights: _Weights, found: _Scores, evaluator: Evaluator
) -> AttentionSite | None:
    assert found.query is not None and found.key is not None
    assert weights.product is not None and found.product is not None
    product, value = weights.product, weights.product.args[1]
    if not isinstance(value, fx.Node):
        return None
    copies = found.key, value
    key, value, repeated = undo_repeats(found.query, *copies)
    shapes = [sizes_of(t) for t in (found.query, key, value)]
    if any(len(s) != 4 or not s[1].is_Integer for s in shapes):
        return None
    site = AttentionSite(0, product, found.query, key, value, "eager")
    site = replace(
        site, scale=found.scale, softcap=found.softcap, repeats_heads=repeated
    )
    if found.sinks:
        return replace(site, mask=found.mask, unsupported="attention sinks")
    if weights.dropped:
        return replace(site, unsupported="dropout")
    site = _without_nan(checked(with_mask(site, found.mask, evaluator)))
    reads = [(found.query, found.product), (key, found.product)]
    reads += zip((key, value), copies, strict=True) if repeated else []
    return unwritten(site, evaluator, reads)


def _without_nan(site: AttentionSite) -> AttentionSite:
    """Softmax of a row of minus infinities is NaN, where the op gives zeros."""
    if site.unsupported or site.hides_finitely or site.mask is None:
        return site
    if site.key_mask is None and every_row_sees_a_key(site):
        return site
    return replace(site, unsupported="rows that see no key become NaN")


class _Scores:
    """What is found on the way from softmax back to query and key."""

    def __init__(self) -> None:
        self.query: fx.Node | None = None
        self.key: fx.Node | None = None
        self.product: fx.Node | None = None
        self.mask: fx.Node | None = None
        self.scale = 1.0
        self.softcap = 0.0
        self.sinks = False
        self.stop = "nothing"

    def read(self, node: fx.Node | None) -> bool:
        """Walk back; return whether query and key were found."""
        for _ in range(12):
            node = _skip_casts(node)
            if node is None:
                return False
            self.stop = _origin(node)
            if op_name(node) == "matmul":
                return self._product(node)
            node = self._step(node)
        return False

    def _step(self, node: fx.Node) -> fx.Node | None:
        name = op_name(node)
        if name == "add" and self.mask is None and self.softcap == 0.0:
            return self._masked(node)
        if name in ("mul", "div"):
            return self._scaled(node, name)
        if name == "cat":
            self.sinks = True
            first = node.args[0]
            return first[0] if isinstance(first, (list, tuple)) else None  # type: ignore[return-value]
        if name == "sub" and self.sinks is False and _is_shift(node):
            return node.args[0]  # type: ignore[return-value]
        return None

    def _masked(self, node: fx.Node) -> fx.Node | None:
        left, right = node.args[:2]
        if not isinstance(left, fx.Node) or not isinstance(right, fx.Node):
            return None
        self.mask = right
        return left

    def _scaled(self, node: fx.Node, name: str) -> fx.Node | None:
        left, right = node.args[:2]
        factor = float_of(right)
        if not isinstance(left, fx.Node) or factor is None or factor == 0.0:
            return None
        inner = _skip_casts(left)
        if name == "mul" and inner is not None and op_name(inner) == "tanh":
            return self._capped(inner, factor)
        self.scale *= factor if name == "mul" else 1.0 / factor
        return left

    def _capped(self, tanh: fx.Node, cap: float) -> fx.Node | None:
        divided = tanh.args[0]
        if not isinstance(divided, fx.Node) or op_name(divided) != "div":
            return None
        if float_of(divided.args[1]) != cap or self.scale != 1.0:
            return None
        self.softcap = cap
        return divided.args[0]  # type: ignore[return-value]

    def _product(self, node: fx.Node) -> bool:
        query, transposed = node.args[:2]
        if not isinstance(query, fx.Node) or not isinstance(transposed, fx.Node):
            return False
        if op_name(transposed) != "transpose":
            return False
        axes = {int(a) % 4 for a in transposed.args[1:3]}  # type: ignore[arg-type]
        key = transposed.args[0]
        if axes != {2, 3} or not isinstance(key, fx.Node):
            return False
        self.query, self.key, self.product = query, key, node
        return True


def _is_shift(node: fx.Node) -> bool:
    """Subtracting the row's maximum before softmax changes nothing."""
    scores, shift = node.args[:2]
    if isinstance(shift, fx.Node) and op_name(shift) in ("getattr", "getitem"):
        if shift.args[1] not in ("values", 0):
            return False
        shift = shift.args[0]
    if not isinstance(shift, fx.Node) or op_name(shift) not in ("amax", "max"):
        return False
    axis = argument(shift, 1, "dim")
    return shift.args[0] is scores and axis in (-1, 3, (-1,), [-1])


class _Weights:
    """What is found on the way from softmax on to the product with the values."""

    def __init__(self) -> None:
        self.product: fx.Node | None = None
        self.dropped = False
        self.sliced = False
        self.stop = ""

    def read(self, softmax: fx.Node) -> bool:
        """Follow casts, slices and dropout; return whether the product was found."""
        node = softmax
        for _ in range(8):
            # Returned attention weights would need the full matrix.
            self.stop = " and ".join(sorted(op_name(user) for user in node.users))
            if len(node.users) != 1:
                return False
            user = next(iter(node.users))
            if op_name(user) == "matmul" and user.args[0] is node:
                self.product = user
                return True
            if not self._passes(user):
                return False
            node = user
        return False

    def _passes(self, node: fx.Node) -> bool:
        if op_name(node) == "dropout":
            self.dropped |= drops(node)
        elif op_name(node) == "getitem":
            self.sliced = True
        else:
            return op_name(node) in _CASTS
        return True


def _origin(node: fx.Node) -> str:
    """Name the operator, and below a change of shape the one that computed."""
    source = node.args[0] if node.args else None
    if op_name(node) != "reshape" or not isinstance(source, fx.Node):
        return op_name(node)
    return f"{op_name(node)} of {_origin(source)}"


def _skip_casts(node: Any) -> fx.Node | None:
    while isinstance(node, fx.Node) and op_name(node) in _CASTS:
        node = node.args[0]
    return node if isinstance(node, fx.Node) and value_of(node) is not None else None
