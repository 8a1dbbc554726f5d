"""One name for every spelling of an operator, and small questions about nodes."""

from __future__ import annotations

from typing import Any

import sympy
import torch
from torch import fx

# torch., F., torch._C._nn., operator., method and aten spellings of the same thing.
_SYNONYMS = {
    "scaled_dot_product_attention": "sdpa",
    "truediv": "div",
    "true_divide": "div",
    "floordiv": "floor_divide",
    "logical_and": "and",
    "bitwise_and": "and",
    "logical_or": "or",
    "bitwise_or": "or",
    "logical_not": "invert",
    "bitwise_not": "invert",
    "inv": "invert",
    "less_equal": "le",
    "less": "lt",
    "greater_equal": "ge",
    "greater": "gt",
    "view": "reshape",
    "_unsafe_view": "reshape",
    "type": "to",
    "_to_copy": "to",
    "permute_copy": "permute",
    "swapaxes": "transpose",
    "concat": "cat",
    "concatenate": "cat",
    "broadcast_to": "expand",
    "softmax_": "softmax",
    "_softmax": "softmax",
    "subtract": "sub",
    "multiply": "mul",
    "bmm": "matmul",
    "sym_size": "size",
}
_MUTATING = {"setitem", "copy_", "index_put_", "iadd", "imul", "isub", "iand", "ior"}


def op_name(node: fx.Node) -> str:
    """Return the canonical short name of what ``node`` computes."""
    if node.op not in ("call_function", "call_method"):
        return node.op
    name = _raw_name(node)
    return _SYNONYMS.get(name, name)


def _raw_name(node: fx.Node) -> str:
    target: Any = node.target
    if isinstance(target, str):
        return target.strip("_") if target.startswith("__") else target
    if isinstance(target, torch._ops.OpOverload):
        packet = target._schema.name
        return packet.removeprefix("aten::").replace("::", ".")
    if isinstance(target, torch._ops.OpOverloadPacket):
        return str(target._qualified_op_name).removeprefix("aten::").replace("::", ".")
    name = str(getattr(target, "__name__", target))
    if getattr(target, "__module__", "") == "_operator":
        return name.strip("_")
    return name


def is_mutating(node: fx.Node) -> bool:
    """Tell whether ``node`` writes to one of its inputs."""
    if isinstance(node.target, torch._ops.OpOverload):
        return bool(node.target._schema.is_mutable)
    name = _raw_name(node)
    if name in _MUTATING or node.kwargs.get("out") is not None:
        return True
    if node.kwargs.get("inplace") is True:
        return True
    return name.endswith("_") and not name.startswith("_") and node.op != "placeholder"


def is_mutated(node: fx.Node) -> bool:
    """Tell whether some user writes to ``node`` in place."""
    return any(is_mutating(u) and u.args and u.args[0] is node for u in node.users)


def value_of(node: Any) -> Any:
    """Return the fake value of a node, or the literal itself."""
    return node.meta.get("example_value") if isinstance(node, fx.Node) else node


def shape_of(node: fx.Node) -> tuple[Any, ...] | None:
    """Return the sizes of a tensor node (ints and SymInts), or None."""
    value = value_of(node)
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def size_expr(value: Any) -> Any:
    """Return an int, SymInt or size node as a sympy expression, or None."""
    value = value_of(value)
    if isinstance(value, torch.SymInt):
        return value.node.expr
    if isinstance(value, bool) or not isinstance(value, int):
        return None
    return sympy.Integer(value)


def argument(node: fx.Node, index: int, name: str, default: Any = None) -> Any:
    """Return an argument given by position or by keyword."""
    if len(node.args) > index:
        return node.args[index]
    return node.kwargs.get(name, default)


def float_of(value: Any) -> float | None:
    """Return a literal float, or the value of a float node that is known."""
    value = value_of(value)
    if isinstance(value, torch.SymFloat):
        known = value.node.maybe_as_float()
        return None if known is None else float(known)
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    return None
