"""Linear sites: products of activations with a parameter."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import fx
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from graphopt.ir.match import argument, op_name, shape_of, value_of

# What passes make of a linear; each takes (input, weight, bias).
_LINEARS = ("skinny", "onednn", "shadow", "int8", "weight_only", "sparse")
REWRITTEN = (*(f"graphopt.{name}_linear" for name in _LINEARS), "graphopt.sparse_up")
_TRANSPOSES = ("getattr", "t", "transpose")


@dataclass(frozen=True)
class LinearSite:
    """``node`` = input [..., K] @ weight [N, K]^T + bias [N].

    ``transposed``: the weight is used as it lies, [K, N] (Conv1D).
    """

    node: fx.Node
    input: fx.Node
    weight: fx.Node
    bias: fx.Node | None
    transposed: bool

    @property
    def rows(self) -> Any:
        """Return the number of rows: int, or SymInt where it changes."""
        rows = prod(value_of(self.input).shape[:-1])  # numel() would fix the sizes
        known = rows.node.maybe_as_int() if isinstance(rows, torch.SymInt) else rows
        return rows if known is None else known

    @property
    def done(self) -> bool:
        """Tell whether a pass has rewritten the linear."""
        return op_name(self.node) in REWRITTEN

    def unsupported(self) -> str:
        """Say why this is no plain product of floats; nothing where it is one."""
        nodes = (self.input, self.weight, self.bias)
        values = [value_of(n) for n in nodes if n is not None]
        if any(not isinstance(v, torch.Tensor) for v in values):
            return "an operand is no tensor"
        if any(is_traceable_wrapper_subclass(v) for v in values):
            return "an operand is a tensor of another kind (sharded, quantised)"
        if len({v.dtype for v in (*values, value_of(self.node))}) > 1:
            return "operands and result differ in dtype (autocast)"
        if not values[0].is_floating_point() or values[1].ndim != 2:
            return "it is no product of a matrix of floats"
        return ""


def find_linears(gm: fx.GraphModule) -> list[LinearSite]:
    """Return the linears of ``gm`` in graph order."""
    sites = []
    for node in gm.graph.nodes:
        if is_linear(node):
            source, weight, bias = operands(node)
            stored = (op_name(node) in ("addmm", "matmul")) and weight in node.args
            sites.append(LinearSite(node, source, weight, bias, stored))
    return sites


def is_linear(node: fx.Node) -> bool:
    """Tell whether ``node`` multiplies by a parameter.

    Spelt as linear, as addmm (Conv1D) or as a product with a transposed weight.
    """
    name = op_name(node)
    if name == "matmul":
        return _is_weight(node.args[1])
    spelt = name == "linear" or name in REWRITTEN
    return spelt or (name == "addmm" and len(node.args) == 3)


def operands(linear: fx.Node) -> tuple[Any, Any, Any]:
    """Return (input, weight, bias); a transposition of the weight is undone."""
    if op_name(linear) == "addmm":
        bias, source, weight = linear.args[:3]
        return source, weight, bias
    source, weight = argument(linear, 0, "input"), argument(linear, 1, "weight")
    while isinstance(weight, fx.Node) and op_name(weight) in _TRANSPOSES:
        weight = weight.args[0]
    return source, weight, argument(linear, 2, "bias")


def _is_weight(value: Any) -> bool:
    while isinstance(value, fx.Node) and op_name(value) in _TRANSPOSES:
        value = value.args[0]
    is_input = isinstance(value, fx.Node) and value.op in ("placeholder", "get_attr")
    return is_input and len(shape_of(value) or ()) == 2
