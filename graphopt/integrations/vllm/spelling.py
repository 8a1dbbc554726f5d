"""vLLM's spellings raised to the canonical operators that sites are found by.

- ``vllm_ir.rms_norm`` and ``fused_add_rms_norm``: a norm, and a residual add.
- ``vllm.unified_attention_with_output``, which writes to a tensor: marked by a node
  that hands on what was written, so that values can be followed through it; `lower`
  takes the marks away.
- A pipeline stage that hands on the residual stream and what is to be added to it: the
  sum is handed on in place of the second, and `lower` parts them again.
- Norms read ``weight.data``: they read the parameter.
- Merged projections (gate and up, queries, keys and values): named after their first
  part, whose input is that of all; gate and up are taken apart on demand.
What is not recognised stays as it is.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from graphopt.ir.attention.site import AttentionSite, register_matcher
from graphopt.ir.constants import NAME, parameter_name
from graphopt.ir.match import argument, op_name, shape_of
from graphopt.ir.replace import call
from graphopt.ir.sites.linear import is_linear, operands

_MARK = "paged_attention"
# Merged parameters, and the first of their parts.
_MERGED = {"gate_up_proj": "gate_proj", "qkv_proj": "q_proj"}
_UP = "up_proj"
_HANDED_ON = "graphopt_handed_on"  # on the sum of a stage's two results


def paged_attention(
    output: Tensor, query: Tensor, key: Tensor, value: Tensor
) -> Tensor:
    """Return ``output``, which attention has been written to."""
    return output


class PagedSite(AttentionSite):
    """Attention over vLLM's cache: query [T, Hq, D], key and value [T, Hkv, D]."""

    @property
    def query_len(self) -> Any:
        """Return the number of the step's tokens."""
        return (shape_of(self.query) or ())[0]

    @property
    def kv_len(self) -> Any:
        """Return the number of the step's tokens; the cache's are not in the graph."""
        return (shape_of(self.key) or ())[0]


@register_matcher(_MARK)
def match_paged(node: fx.Node) -> AttentionSite:
    """Return the site of a mark."""
    _, query, key, value = node.args
    given: Any = {"index": 0, "node": node, "query": query, "key": key, "value": value}
    why = "vLLM attends over its paged cache"
    return PagedSite(**given, form="paged", pattern="causal", unsupported=why)


def raise_ops(gm: fx.GraphModule, split_gates: bool = False) -> None:
    """Rewrite vLLM's operators in ``gm``, in place; ``split_gates``: see the module."""
    for node in list(gm.graph.nodes):
        name = op_name(node)
        if name == "vllm_ir.rms_norm":
            _raise_norm(gm, node)
        elif name == "vllm_ir.fused_add_rms_norm":
            _raise_added_norm(gm, node)
        elif name == "vllm.unified_attention_with_output":
            _mark(gm, node)
        elif name == "_get_data_attr":  # weight.data, read far before it is used
            weight: Any = node.args[0]
            node.replace_all_uses_with(weight)
            gm.graph.erase_node(node)
    for node in list(gm.graph.nodes):
        if is_linear(node):
            _name(gm, node, split_gates)
    _add_handed_on(gm)
    gm.graph.lint()


def lower(gm: fx.GraphModule) -> None:
    """Take away what was there for sites to be found: marks, and a stage's sum."""
    results: Any = gm.graph.output_node().args[0]
    for node in results:
        if isinstance(node, fx.Node) and _HANDED_ON in node.meta:
            branch: Any = node.args[0]
            node.replace_all_uses_with(branch)
            gm.graph.erase_node(node)
    for node in list(gm.graph.nodes):
        if op_name(node) == _MARK:
            node.replace_all_uses_with(node.args[0])
            gm.graph.erase_node(node)


def _add_handed_on(gm: fx.GraphModule) -> None:
    """Let a stage's last layer end in its residual add, which the next stage makes."""
    output = gm.graph.output_node()
    results: Any = output.args[0]
    shapes = [shape_of(r) if isinstance(r, fx.Node) else None for r in results]
    if len(shapes) != 2 or shapes[0] is None or shapes[0] != shapes[1]:
        return
    with gm.graph.inserting_before(output):
        total = call(gm.graph, operator.add, tuple(results))
    total.meta[_HANDED_ON] = True
    output.args = ((total, results[1]),)


def _raise_norm(gm: fx.GraphModule, node: fx.Node) -> None:
    if argument(node, 3, "variance_size") is None:
        source, weight, eps = (
            argument(node, i, n) for i, n in enumerate(("x", "weight", "epsilon"))
        )
        node.replace_all_uses_with(_norm(gm, node, source, weight, eps))
        gm.graph.erase_node(node)


def _raise_added_norm(gm: fx.GraphModule, node: fx.Node) -> None:
    if argument(node, 4, "variance_size") is not None:
        return
    names = ("x", "x_residual", "weight", "epsilon")
    branch, stream, weight, eps = (argument(node, i, n) for i, n in enumerate(names))
    with gm.graph.inserting_before(node):
        added = call(gm.graph, operator.add, (branch, stream))
    results = (_norm(gm, node, added, weight, eps), added)
    for user in list(node.users):
        user.replace_all_uses_with(results[user.args[1]])  # type: ignore[index]
        gm.graph.erase_node(user)
    gm.graph.erase_node(node)


def _norm(
    gm: fx.GraphModule, place: fx.Node, source: Any, weight: Any, eps: Any
) -> fx.Node:
    width = int((shape_of(source) or ())[-1])
    with gm.graph.inserting_before(place):
        args = (source, (width,), weight, eps)
        return call(gm.graph, torch.nn.functional.rms_norm, args)


def _mark(gm: fx.GraphModule, node: fx.Node) -> None:
    """Let what reads the output behind ``node`` read the mark.

    The output is given as a view, and read through that view or another one.
    """
    query, key, value, written = node.args[:4]
    if not all(isinstance(n, fx.Node) for n in (query, key, value)):
        return  # keys of an earlier layer
    order = {n: i for i, n in enumerate(gm.graph.nodes)}
    views: list[Any] = [written]
    while op_name(views[-1]) in ("reshape", "flatten"):
        views.append(views[-1].args[0])
    for view in views:
        if later := [user for user in view.users if order[user] > order[node]]:
            with gm.graph.inserting_after(node):
                mark = call(gm.graph, paged_attention, (view, query, key, value))
            for user in later:
                user.replace_input_with(view, mark)
            return


def _name(gm: fx.GraphModule, linear: fx.Node, split_gates: bool) -> None:
    weight = operands(linear)[1]
    name = parameter_name(weight)
    merged = next((m for m in _MERGED if f".{m}." in f".{name}"), None)
    if merged is None:
        return
    weight.meta[NAME] = name.replace(merged, _MERGED[merged])
    halves = _halves(linear)
    if split_gates and halves and merged == "gate_up_proj":
        _split(gm, linear, halves, name)


def _halves(linear: fx.Node) -> list[fx.Node]:
    """Return what takes the first and the second half of the channels, or nothing."""
    from graphopt.ir.sites.channels import are_halves, half_of

    users = list(linear.users)
    found = [half_of(u) if op_name(u) == "getitem" else None for u in users]
    if len(users) != 2 or any(h is None or h.source is not linear for h in found):
        return []
    if are_halves(found[0], found[1]):
        return users
    return users[::-1] if are_halves(found[1], found[0]) else []


def _split(
    gm: fx.GraphModule, linear: fx.Node, halves: list[fx.Node], name: str
) -> None:
    """Multiply by the rows of gate and of up apart; the weight stays one."""
    source, weight, bias = operands(linear)
    rows = int((shape_of(weight) or ())[0]) // 2
    parts = (slice(None, rows), slice(rows, None))
    for half, part, own in zip(halves, parts, ("gate_proj", _UP), strict=True):
        with gm.graph.inserting_before(linear):
            taken = call(gm.graph, operator.getitem, (weight, part))
            taken.meta[NAME] = name.replace("gate_up_proj", own)
            shift: Any = bias
            if shift is not None:
                shift = call(gm.graph, operator.getitem, (shift, part))
            args = (source, taken, shift)
            node = call(gm.graph, torch.nn.functional.linear, args)
        half.replace_all_uses_with(node)
        gm.graph.erase_node(half)
    gm.graph.erase_node(linear)


__all__ = ["PagedSite", "lower", "paged_attention", "raise_ops"]
