"""What of a graph stays the same from call to call.

A module's float attributes are folded into the graph as literals.

Under ``dynamic=True`` Dynamo passes each float attribute (a norm's epsilon, an
attention's scale) as a zero-dimensional float64 input followed by ``.item()``. As
literals, layers become alike and matchers see numbers. Dynamo guards each value, so an
attribute that changes leads to a new compilation and never to a stale result.
"""

from __future__ import annotations

import re

import torch
from torch import SymFloat, fx
from torch.fx.node import Argument

from graphopt._compat import placeholder_source, specialize_float

_PART = re.compile(r"_(?:modules|parameters|buffers)\['([^']+)'\]")
# On a node: the name of a parameter, or of a part of one, where the model knows it by
# another than the module does (an engine that merges projections).
NAME = "graphopt_parameter_name"
_PARAMETER_PARTS = ("_parameters[", "_buffers[", "_modules[")


def fold_float_attributes(gm: fx.GraphModule) -> int:
    """Replace ``.item()`` of float attributes by their values; return how many.

    Floats that the caller passes as arguments stay dynamic.
    """
    found = [n for n in gm.graph.nodes if _is_float_attribute(n)]
    for node in found:
        value = specialize_float(node.meta["example_value"])
        for user in list(node.users):
            _substitute(user, node, value)
        gm.graph.erase_node(node)
    return len(found)


def _substitute(user: fx.Node, old: fx.Node, value: float) -> None:
    def swap(node: fx.Node) -> Argument:
        return value if node is old else node

    user.args = fx.map_arg(user.args, swap)
    user.kwargs = fx.map_arg(user.kwargs, swap)


def _is_float_attribute(node: fx.Node) -> bool:
    if node.op != "call_method" or node.target != "item":
        return False
    source = node.args[0]
    if not isinstance(source, fx.Node) or source.op != "placeholder":
        return False
    if not isinstance(node.meta.get("example_value"), (SymFloat, float)):
        return False
    return placeholder_source(source).startswith("L['self']")


def is_float_input(node: fx.Node) -> bool:
    """Tell whether a graph input is a float that Dynamo passes as a tensor."""
    value = node.meta.get("example_value")
    is_scalar = isinstance(value, torch.Tensor) and value.dim() == 0
    return is_scalar and placeholder_source(node).startswith("L['self']")


def is_parameter(node: fx.Node) -> bool:
    """Tell whether a node is a parameter or buffer of the module, given or held."""
    if node.op == "get_attr":
        return True
    source = placeholder_source(node)
    held = any(part in source for part in _PARAMETER_PARTS)
    is_one = isinstance(node.meta.get("example_value"), torch.nn.Parameter)
    return node.op == "placeholder" and (held or is_one)


def parameter_name(node: object) -> str:
    """Return a parameter's name in the compiled module (``layers.0.mlp.up.weight``).

    Empty for a node that is none, or of which Dynamo keeps no source.
    """
    if isinstance(node, fx.Node) and NAME in node.meta:
        return str(node.meta[NAME])
    if not isinstance(node, fx.Node) or not is_parameter(node):
        return ""
    return ".".join(_PART.findall(placeholder_source(node)))
