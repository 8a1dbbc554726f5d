"""`logit-arithmetic`: several language models in one graph, combined and sampled."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
from pydantic import Field
from torch import fx

from graphopt.ir.dce import has_effect
from graphopt.ir.logits.combination import (
    Combination,
    combination_at,
    find_combinations,
    head_of,
)
from graphopt.ir.logits.fuse import fuse, to_operator
from graphopt.ir.logits.last_position import select_before_head
from graphopt.ir.logits.twins import Pairs, find_twins, merge_linears, shared_linears
from graphopt.ir.match import sizes_of, value_of
from graphopt.ir.model_graph import ModelGraph
from graphopt.ir.sites.linear import is_linear, operands
from graphopt.passes.base import Pass, PassContext, PassResult, option
from graphopt.remarks import Remark, applied, missed

# Rows up to which a product is bound by the reading of its weight.
_FEW_ROWS = 64


@dataclass(frozen=True, kw_only=True)
class LogitArithmetic(Pass):
    """Make one forward of a large model, small ones, and the sum of their logits.

    `graphopt.ensemble` and loops written by hand compute base + beta (tuned -
    reference). Its graph is found by what it computes: logits of LM heads that are
    added. Then the sum, the filter and the choice of a token become one operator that
    writes no logits; heads compute the position that is used and no other; and where a
    tuned model and its reference read the same weights (a low-rank adapter over the
    shared model), their rows are multiplied together, so that a decoding step reads
    each weight once for both. Lossless, and always pays where it applies.

    Forwards of one architecture with weights of their own stay two: stacked weights
    save calls and not bytes, which decoding is bound by, and take the memory of both
    once more (`graphopt bench eft` has the products side by side).

    Before::

        %z = graphopt.combine_logits(%base, [%tuned], [%reference], %weights, %beta)
        %y = linear(%x_tuned, %weight)
        %y' = linear(%x_reference, %weight)
        %token = graphopt.sample_logits(%z, %uniform, %temperature, %top_p)

    After::

        %both = linear(cat([%x_reference, %x_tuned]), %weight)
        %y', %y = chunk(%both, 2)
        %token = graphopt.combine_sample(%base, [%tuned], [%reference], ...)

    Refuses when

    - ``logits-used``: the combined logits are returned or read by something else than
      a choice of a token, so that they must be written;
    - ``dtype``: a sum in plain arithmetic is made in less than float32;
    - ``not-twins``: the two forwards of a pair do not compute the same;
    - ``separate-weights``: they do, with different weights;
    - ``many-rows``: products of so many rows are not bound by reading weights;
    - ``shapes``: the twins' inputs differ in shape (prompts of different length);
    - ``effects``: calls of the graph write to their inputs or have another effect, so
      that calls cannot change places.
    """

    name: ClassVar[str] = "logit-arithmetic"
    source: ClassVar[str] = "EFT (Mitchell et al. 2023), proxy-tuning (Liu et al. 2024)"
    exact: ClassVar[bool] = True
    never_after: ClassVar[Mapping[str, str]] = {
        "skinny-linear": "it finds linears as models spell them",
    }

    rows: Annotated[int, Field(ge=1)] = option(
        _FEW_ROWS, "most rows that twins multiply together", "rows"
    )

    def run(self, model: ModelGraph, context: PassContext) -> PassResult:
        """Rewrite every combination of logits, then the forwards behind them."""
        remarks: list[Remark] = []
        combinations = find_combinations(model.gm)
        heads = _twin_heads(combinations)  # the linears stay, what is behind goes
        for index, found in enumerate(combinations):
            remarks += _rewrite_tail(model.gm, f"combination[{index}]", found)
        remarks += self._share(model.gm, heads)
        changed = any(r.kind == "applied" for r in remarks)
        statistics = {"combinations": len(combinations)}
        return PassResult(changed, tuple(remarks), statistics)

    def _share(
        self, gm: fx.GraphModule, heads: Sequence[tuple[fx.Node, fx.Node]]
    ) -> list[Remark]:
        every, remarks = [], []
        for index, (reference, tuned) in enumerate(heads):
            name = f"twins[{index}]"
            pairs = find_twins(reference, tuned)
            if isinstance(pairs, str):
                remarks.append(missed(name, "not-twins", pairs))
            elif reason := _separate(pairs):
                remarks.append(missed(name, "separate-weights", reason))
            else:
                every.append(pairs)
        groups = shared_linears(every)
        if not groups:
            return remarks
        refused = self._refusal(gm, groups)
        if refused:
            return [*remarks, missed("twins", *refused)]
        merge_linears(gm, groups)
        text = f"{len(groups)} linears read their weight once for all twins"
        return [*remarks, applied("twins", text, linears=len(groups))]

    def _refusal(
        self, gm: fx.GraphModule, groups: Sequence[list[fx.Node]]
    ) -> tuple[str, str] | None:
        if effects := [n.name for n in gm.graph.nodes if _acts(n)]:
            return "effects", f"{effects[0]} keeps its place among the calls"
        for group in groups:
            shapes = {sizes_of(operands(node)[0]) for node in group}
            if len(shapes) > 1:
                return "shapes", f"{group[0].name} and its twin have different inputs"
            rows = 1
            for size in next(iter(shapes))[:-1]:
                rows = rows * size
            few = getattr(rows, "is_number", True) and rows <= self.rows
            if not few and not self.force:
                return "many-rows", f"{rows} rows are bound by arithmetic, not reading"
        return None


def _rewrite_tail(gm: fx.GraphModule, name: str, found: Combination) -> list[Remark]:
    """Move the selection of positions before the heads, and fuse what follows."""
    selected = sum(select_before_head(gm, logits) for logits in found.logits)
    remarks = []
    if selected:
        text = f"{selected} head(s) compute the positions that are used"
        remarks.append(applied(name, text, heads=selected))
        found = combination_at(found.node) or found
    if found.plain:
        operator = to_operator(gm, found)
        if isinstance(operator, str):
            return [*remarks, missed(name, "dtype", operator)]
        found = operator
        remarks.append(applied(name, "plain arithmetic is one operator, in float32"))
    reason = fuse(gm, found)
    if reason:
        return [*remarks, missed(name, "logits-used", reason)]
    pairs = len(found.tuned)
    return [*remarks, applied(name, f"{pairs} pair(s) and sampling fused", pairs=pairs)]


def _twin_heads(combinations: Sequence[Combination]) -> list[tuple[fx.Node, fx.Node]]:
    """Return the heads of (reference, tuned), each pair once."""
    found: dict[tuple[fx.Node, fx.Node], None] = {}
    for combination in combinations:
        sides = zip(combination.reference, combination.tuned, strict=True)
        for reference, tuned in sides:
            heads = (head_of(reference), head_of(tuned))
            if None not in heads and heads[0] is not heads[1]:
                found[heads] = None  # type: ignore[index]
    return list(found)


def _separate(pairs: Pairs) -> str:
    """Say how much the twins' own weights are; nothing where any linear is shared."""
    linears = [(one, other) for one, other in pairs.items() if is_linear(one)]
    if any(operands(a)[1:] == operands(b)[1:] for a, b in linears):
        return ""
    weights = [value_of(operands(node)[1]) for pair in linears for node in pair]
    size = sum(w.numel() * w.element_size() for w in weights if _known(w))
    return (
        f"{len(linears)} linears of one shape have weights of their own: stacked they "
        f"would take {size / 1e6:.3g} MB more, and a step would read the same bytes"
    )


def _acts(node: fx.Node) -> bool:
    return node.op not in ("placeholder", "output") and has_effect(node)


def _known(weight: object) -> bool:
    return isinstance(weight, torch.Tensor)
