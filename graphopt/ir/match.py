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
    "divide": "div",
    "floordiv": "floor_divide",
    "logical_and": "and",
    "bitwise_and": "and",
    "logical_or": "or",
    "bitwise_or": "or",
    "logical_xor": "xor",
    "bitwise_xor": "xor",
    "logical_not": "invert",
    "bitwise_not": "invert",
    "inv": "invert",
    "not_": "invert",
    "less_equal": "le",
    "less": "lt",
    "greater_equal": "ge",
    "greater": "gt",
    "not_equal": "ne",
    "view": "reshape",
    "view_as": "reshape",
    "_unsafe_view": "reshape",
    "type": "to",
    "_to_copy": "to",
    "permute_copy": "permute",
    "swapaxes": "transpose",
    "swapdims": "transpose",
    "concat": "cat",
    "concatenate": "cat",
    "broadcast_to": "expand",
    "_softmax": "softmax",
    "_safe_softmax": "softmax",
    "subtract": "sub",
    "multiply": "mul",
    "negative": "neg",
    "absolute": "abs",
    "bmm": "matmul",
    "mm": "matmul",
    "sym_size": "size",
    "scalar_tensor": "tensor",
    "native_dropout": "dropout",
    "feature_dropout": "dropout",
}
_IN_PLACE_OPERATORS = {
    *("iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul"),
    *("iand", "ior", "ixor", "ilshift", "irshift", "iconcat", "setitem", "delitem"),
}


def op_name(node: fx.Node) -> str:
    """Return the canonical short name of what ``node`` computes.

    ``a @ b``, ``torch.bmm`` and ``aten.matmul`` are all ``matmul``; operators of other
    libraries keep their namespace, as in ``graphopt.attention``.
    """
    if node.op not in ("call_function", "call_method"):
        return node.op
    name = raw_name(node)
    return _SYNONYMS.get(name, name)


def is_own(node: fx.Node) -> bool:
    """Tell whether ``node`` calls an operator or a function of graphopt."""
    module = str(getattr(node.target, "__module__", ""))
    return op_name(node).startswith("graphopt.") or module.startswith("graphopt.")


def raw_name(node: fx.Node) -> str:
    """Return the name of a call as it is spelt, without its module."""
    target: Any = node.target
    if isinstance(target, str):
        return target.strip("_") if target.startswith("__") else target
    if isinstance(target, torch._ops.OpOverload):
        return _qualified(target._schema.name)
    if isinstance(target, torch._ops.OpOverloadPacket):
        return _qualified(str(target._qualified_op_name))
    name = str(getattr(target, "__name__", target))
    if getattr(target, "__module__", "") == "_operator":
        return name.strip("_")
    return name


def _qualified(name: str) -> str:
    return name.removeprefix("aten::").replace("::", ".")


def is_mutating(node: fx.Node) -> bool:
    """Tell whether ``node`` writes to one of its inputs."""
    if node.op not in ("call_function", "call_method"):
        return False
    if isinstance(node.target, torch._ops.OpOverload):
        return bool(node.target._schema.is_mutable)
    if isinstance(node.target, torch._ops.OpOverloadPacket):
        found = (getattr(node.target, name) for name in node.target.overloads())
        return any(overload._schema.is_mutable for overload in found)
    if node.kwargs.get("out") is not None or node.kwargs.get("inplace") is True:
        return True
    name = raw_name(node)
    if getattr(node.target, "__module__", "") == "_operator":
        return name in _IN_PLACE_OPERATORS
    if node.op == "call_method" and str(node.target).startswith("__i"):
        return f"{name}" in _IN_PLACE_OPERATORS
    return name.endswith("_") and not name.endswith("__")


def value_of(node: Any) -> Any:
    """Return the fake value of a node, or the literal itself."""
    return node.meta.get("example_value") if isinstance(node, fx.Node) else node


def shape_of(node: Any) -> tuple[Any, ...] | None:
    """Return the sizes of a tensor node (ints and SymInts), or None."""
    value = value_of(node) if isinstance(node, fx.Node) else None
    return tuple(value.shape) if isinstance(value, torch.Tensor) else None


def sizes_of(node: Any) -> tuple[Any, ...]:
    """Return the sizes of a tensor node as sympy expressions; () when it is none."""
    return tuple(size_expr(size) for size in shape_of(node) or ())


def size_expr(value: Any) -> Any:
    """Return an int, SymInt or size node as a sympy expression, or None."""
    value = value_of(value)
    if isinstance(value, torch.SymInt):
        return value.node.expr
    if isinstance(value, bool) or not isinstance(value, int):
        return None
    return sympy.Integer(value)


def same_size(left: Any, right: Any) -> bool:
    """Tell whether two sizes (sympy expressions) are equal for every input."""
    return bool(left == right or sympy.expand(left - right) == 0)


def at_least_zero(expr: Any) -> bool:
    """Tell whether a size is zero or more for every input; maxima are looked into.

    An expression has its value at one of the operands of any Max or Min in it.
    """
    if expr.is_nonnegative:
        return True
    extremes = [e for e in sympy.preorder_traversal(expr) if _is_extreme(e)]
    if not extremes:
        return False
    cases = [expr.xreplace({extremes[0]: part}) for part in extremes[0].args]
    return all(at_least_zero(sympy.expand(case)) for case in cases)


def _is_extreme(expr: Any) -> bool:
    # By name: torch has a Max and Min of its own.
    return type(expr).__name__ in ("Max", "Min")


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
