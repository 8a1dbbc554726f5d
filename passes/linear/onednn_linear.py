"""`onednn-linear`: linears read weights that oneDNN has rearranged once."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Annotated, ClassVar

import torch
from pydantic import Field

from graphopt.ir.constants import is_parameter
from graphopt.ir.match import value_of
from graphopt.ir.model_graph import ModelGraph
from graphopt.ir.sites.linear import LinearSite
from graphopt.ops.onednn_linear import available
from graphopt.passes.base import Pass, PassContext, PassResult, option
from graphopt.passes.linear.visit import replace_linear, visit_linears
from graphopt.remarks import Remark, applied


@dataclass(frozen=True, kw_only=True)
class OneDnnLinear(Pass):
    """Multiply by weights that lie as the processor's registers want them.

    A BLAS rearranges a weight within every call, which the rows of a long prompt pay
    for and those of a chunk, or of a few prompts that are decoded together, do not.
    Here oneDNN rearranges each weight at its first use and keeps it beside the
    original: the linears' weights take their memory twice (the remarks say how much).
    Lossless: the same products in another order of summation. A weight that changes is
    rearranged again.

    Before::

        %y = linear(%x, %weight, %bias)

    After::

        %y = graphopt.onednn_linear(%x, %weight, %bias, False)

    Refuses when

    - ``few-rows``: the input has ``few`` rows or less, which `skinny-linear` serves
      better and without the second copy;
    - ``slower``: the type is not float32, which is all that was seen to gain;
    - ``changes``: the weight is no parameter, so each call would rearrange it;
    - ``unsupported``: the device is no CPU, torch has no oneDNN, or operands of other
      types, such as autocast or sharded weights.
    """

    name: ClassVar[str] = "onednn-linear"
    source: ClassVar[str] = "lossless; weights in oneDNN's blocked layout"
    exact: ClassVar[bool] = True

    few: Annotated[int, Field(ge=0)] = option(
        4, "most rows, where their number is fixed, that are left alone", "rows"
    )

    def run(self, model: ModelGraph, context: PassContext) -> PassResult:
        """Rewrite every linear over a parameter."""

        def rewrite(name: str, site: LinearSite) -> Remark:
            op = torch.ops.graphopt.onednn_linear.default
            replace_linear(model, site, op, site.transposed)
            weight = value_of(site.weight)
            size = weight.numel() * weight.itemsize
            text = f"a second copy of {size / 1e6:.1f} MB in oneDNN's layout"
            return applied(name, text, bytes=size)

        return visit_linears(model, partial(self._refusal, context=context), rewrite)

    def _refusal(
        self, site: LinearSite, context: PassContext
    ) -> tuple[str, str] | None:
        if site.done:
            return "done", "another pass has rewritten the linear"
        if reason := site.unsupported() or _unsupported(site, context):
            return "unsupported", reason
        if not is_parameter(site.weight):
            return "changes", "the weight is computed, so each call would rearrange it"
        rows = site.rows
        if isinstance(rows, int) and rows <= self.few:
            return "few-rows", f"{rows} row(s) are skinny-linear's to multiply"
        dtype = value_of(site.weight).dtype
        if dtype != torch.float32 and not self.force:
            return "slower", f"{dtype} gained nothing where it was measured"
        return None


def _unsupported(site: LinearSite, context: PassContext) -> str:
    if context.device != "cpu":
        return f"oneDNN serves the CPU, not {context.device}"
    if not available():
        return "torch was built without oneDNN"
    dtype = value_of(site.weight).dtype
    if dtype not in (torch.float32, torch.bfloat16):
        return f"oneDNN multiplies float32 and bfloat16 on any CPU, not {dtype}"
    return ""
