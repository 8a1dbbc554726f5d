"""`skinny-linear`: linears of a decoding step read weights as fast as memory can."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from graphopt.ir.match import value_of
from graphopt.ir.model_graph import ModelGraph
from graphopt.ir.sites.linear import LinearSite
from graphopt.passes.base import Pass, PassContext, PassResult, option
from graphopt.passes.linear.visit import replace_linear, visit_linears
from graphopt.remarks import Remark, applied

# Rows up to which dot products read weights faster than BLAS multiplies, on a CPU
# (benchmarks/linear.py); other types are served as fast by BLAS.
_MOST_ROWS = {torch.float32: 4, torch.bfloat16: 1}


@dataclass(frozen=True, kw_only=True)
class SkinnyLinear(Pass):
    """Turn linears over few rows into dot products that one loop computes.

    A decoding step multiplies one row (one a prompt) with every weight of the model, so
    its time is that of reading the weights. On a CPU the BLAS behind torch reads them
    at a third to two thirds of the rate that memory has; loops that Inductor makes of
    the sums read them at all of it, once for all rows. Lossless: the same products in
    another order of summation. Pays on a CPU in every decoding step, in float32 up to 4
    rows and in bfloat16 with one.

    Before::

        %y = linear(%x, %weight, %bias)

    After::

        %y = graphopt.skinny_linear(%x, %weight, %bias)

    Refuses when

    - ``many-rows``: the input has more than ``rows`` rows, or a number that changes
      between calls (with several prompts compile with ``dynamic=None``, which takes a
      batch size as fixed until it changes);
    - ``slower``: the device's BLAS is predicted to be as fast;
    - ``layout``: a row of the weight does not lie in one piece (Conv1D);
    - ``unsupported``: operands of other types, such as autocast or sharded weights.
    """

    name: ClassVar[str] = "skinny-linear"
    source: ClassVar[str] = "lossless; general matrix-vector product at memory's rate"
    exact: ClassVar[bool] = True

    rows: Annotated[int, Field(ge=1, le=16)] = option(
        4, "most rows that are multiplied so", "rows"
    )

    def run(self, model: ModelGraph, context: PassContext) -> PassResult:
        """Rewrite every linear over few rows."""

        def rewrite(name: str, site: LinearSite) -> Remark:
            rows = site.rows
            replace_linear(model, site, torch.ops.graphopt.skinny_linear.default)
            return applied(name, f"{rows} row(s) as dot products", rows=rows)

        return visit_linears(model, partial(self._refusal, context=context), rewrite)

    def _refusal(
        self, site: LinearSite, context: PassContext
    ) -> tuple[str, str] | None:
        source, weight = value_of(site.input), value_of(site.weight)
        if site.done:
            return "done", "another pass has rewritten the linear"
        if reason := site.unsupported():
            return "unsupported", reason
        rows = site.rows
        if not isinstance(rows, int):
            return "many-rows", f"their number, {rows}, changes between calls"
        if rows > self.rows:
            return "many-rows", f"{rows} rows are multiplied together"
        if weight.stride(-1) != 1 or site.transposed:
            return "layout", "the weight's rows do not lie in one piece"
        if self.force:
            return None
        if context.device != "cpu":
            return "slower", f"{context.device} reads weights at memory's rate already"
        if rows > _MOST_ROWS.get(source.dtype, 0):
            return "slower", f"{rows} row(s) of {source.dtype} are BLAS's to multiply"
        return None
