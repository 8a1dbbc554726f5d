"""What passes share that rewrite the linears of a graph one by one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from graphopt.ir.model_graph import ModelGraph
from graphopt.ir.replace import call, substitute
from graphopt.ir.sites.linear import LinearSite, operands
from graphopt.passes.base import PassResult
from graphopt.remarks import Remark, missed


def visit_linears(
    model: ModelGraph,
    refusal: Callable[[LinearSite], tuple[str, str] | None],
    rewrite: Callable[[str, LinearSite], Remark],
) -> PassResult:
    """Rewrite every linear that ``refusal`` has no code and reason against.

    ``rewrite`` gets the linear's name in the remarks and returns the remark of it.
    """
    remarks = []
    for index, site in enumerate(model.linears):
        name = f"linear[{index}]"
        refused = refusal(site)
        remarks.append(missed(name, *refused) if refused else rewrite(name, site))
    changed = any(r.kind == "applied" for r in remarks)
    return PassResult(changed, tuple(remarks), {"sites": len(remarks)})


def replace_linear(model: ModelGraph, site: LinearSite, op: Any, *more: Any) -> None:
    """Put ``op``(input, weight, bias, *more) in the place of ``site``."""
    graph = model.gm.graph
    # Not the site's own: an input that was a linear itself has been replaced.
    with graph.inserting_before(site.node):
        node = call(graph, op, (*operands(site.node), *more))
    substitute(model.gm, site.node, node)
