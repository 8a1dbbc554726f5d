"""`weight-tying`: the layers of a stage read one set of parameters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import isinf
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from graphopt.ir.model_graph import ModelGraph
from graphopt.ir.sites.parameters import read_instead
from graphopt.passes.base import Pass, PassContext, PassResult, Selects, option
from graphopt.passes.weights.stages import (
    StackLayer,
    alike,
    difference,
    find_stacks,
    matches,
    pairs,
    ranges,
)
from graphopt.remarks import Remark, analysis, applied, missed

_NEVER = "its loop has taken the layers' parameters as they were; tie them first"


@dataclass(frozen=True, kw_only=True)
class WeightTying(Pass):
    """Let the layers of a stage read the parameters of its first layer.

    ``stages = [3, 3, 4, 3, 3]`` makes five stages of sixteen layers (the auxiliary
    model of SWS). Only what the layers read changes: every layer keeps its operators,
    its attention window, its slot of the key-value cache and its drop-path rate.
    Parameters outside the layers (embeddings, positions, final norm, head) are never
    tied, nor are buffers. Where training is compiled, the gradients of a stage's layers
    add up in the parameters of its first layer, and those of the others get none.
    Layers that were trained apart do not mean the same by their parameters: tie a model
    that was trained so (`graphopt.learngene`), or train it afterwards. Stages of one
    layer each leave the graph as it is, bit for bit.

    ``auto`` makes stages of neighbours that are alike already: a layer joins while
    sqrt(sum |a - b|^2 / sum (|a|^2 + |b|^2)) over its parameters b and those a of the
    stage's first layer is at most ``tolerance`` (0: equal, 1: unrelated). It is
    measured when a graph is compiled; the remark has the stages, to be written down.

    It costs no time and saves none by itself: the floating-point work stays. A graph
    reads fewer bytes from memory where a stage's weights fit the cache; the memory of
    the parameters is saved where the model holds them once (`graphopt.learngene`).

    Before::

        %x = linear(%h, %layers.0.mlp.up.weight)
        %y = linear(%x, %layers.1.mlp.up.weight)

    After::

        %x = linear(%h, %layers.0.mlp.up.weight)
        %y = linear(%x, %layers.0.mlp.up.weight)

    Refuses when

    - ``no-layers``: no stack of layers was found along a residual stream;
    - ``count``: no stack has as many layers as ``stages`` say;
    - ``ambiguous``: several have, and ``stack`` does not choose;
    - ``no-values``: ``auto``, and the graph was captured without the weights' values;
    - ``sharded``: ``auto`` compares all weights, and ranks share them out;
    - ``structure``: layers of a stage differ in heads, in the form of the feed-forward
      part, or in the operators that read parameters;
    - ``shape``: a parameter has another shape, type or device, or is frozen in one of
      the layers only;
    - ``single``: the stage has one layer;
    - ``done``: its layers share their parameters already;
    - ``unmatched``: an ``untied`` pattern fits no parameter of the layers.
    """

    name: ClassVar[str] = "weight-tying"
    source: ClassVar[str] = "SWS (Xia et al. 2024, stage-wise weight sharing)"
    never_after: ClassVar[Mapping[str, str]] = {"chunked-prefill": _NEVER}

    stages: list[Annotated[int, Field(ge=1)]] | Literal["auto"] = option(
        "auto", "layers of each stage, in order; auto finds layers that are alike"
    )
    untied: list[str] = option(
        [],
        "what each layer keeps: norm, bias, or patterns of names (*.mlp.*, *q_proj*)",
    )
    tolerance: Annotated[float, Field(ge=0.0, le=1.0)] = option(
        0.1, "auto: the greatest distance within a stage"
    )
    stack: int | None = option(
        None, "which stack of layers, counted in graph order; needed if several fit"
    )

    @model_validator(mode="after")
    def _some_stages(self) -> Self:
        if not self.stages:
            raise ValueError("stages is empty; give the layers of each, as [3, 3, 4]")
        return self

    @property
    def selects_over(self) -> Selects:
        """Layers that are alike are told by all of their weights."""
        return "weights" if isinstance(self.stages, str) else "nothing"

    def run(self, model: ModelGraph, context: PassContext) -> PassResult:
        """Tie the layers of one stack."""
        layers = self._choose(find_stacks(model))
        if isinstance(layers, Remark):
            return PassResult(False, (layers,))
        try:
            stages, remarks = self._stages(layers)
        except ValueError as error:
            return PassResult(False, (missed("graph", "no-values", str(error)),))
        remarks += self._unmatched(layers)
        for index, span in enumerate(ranges(stages)):
            tied = layers[span.start : span.stop]
            remarks.append(self._tie(f"stage[{index}]", tied, span))
        changed = any(r.kind == "applied" for r in remarks)
        counts = {"layers": len(layers), "stages": len(stages)}
        return PassResult(changed, tuple(remarks), counts)

    def _stages(self, layers: list[StackLayer]) -> tuple[list[int], list[Remark]]:
        if not isinstance(self.stages, str):
            return self.stages, []
        stages, distances = alike(layers, self.tolerance, self.untied)
        text = f"stages = {stages} within {self.tolerance:g}"
        figures = [None if isinf(d) else round(d, 4) for d in distances]
        return stages, [analysis("graph", "stages", text, distances=figures)]

    def _choose(self, stacks: list[list[StackLayer]]) -> list[StackLayer] | Remark:
        """Return the layers to tie, or the remark of why there are none."""
        if not any(stacks):
            return missed("graph", "no-layers", "no stack of layers was found")
        sizes = [len(stack) for stack in stacks]
        fit = [i for i, size in enumerate(sizes) if self._fits(i, size)]
        if not fit:
            text = f"stages = {self.stages} do not fit the stacks of {sizes} layers"
            return missed("graph", "count", text)
        if len(fit) > 1:
            text = f"the stacks have {sizes} layers; choose one, such as stack = 0"
            return missed("graph", "ambiguous", text)
        return stacks[fit[0]]

    def _fits(self, index: int, size: int) -> bool:
        wanted = size if isinstance(self.stages, str) else sum(self.stages)
        return size == wanted > 0 and self.stack in (None, index)

    def _unmatched(self, layers: list[StackLayer]) -> list[Remark]:
        uses = [use for layer in layers for use in layer.uses]
        idle = [p for p in self.untied if not any(matches(u, [p]) for u in uses)]
        text = "'{}' in untied fits no parameter of the layers"
        return [missed("graph", "unmatched", text.format(p)) for p in idle]

    def _tie(self, name: str, layers: list[StackLayer], span: range) -> Remark:
        if len(layers) == 1:
            return missed(name, "single", f"layer {span.start} is alone")
        first, *rest = layers
        for number, other in zip(span[1:], rest, strict=True):
            if refusal := difference(first, other):
                code, reason = refusal
                return missed(name, code, f"layers {span.start}, {number}: {reason}")
        given = [self._read_first(first, other) for other in rest]
        saved, count = sum(g[0] for g in given), sum(g[1] for g in given)
        if not count:
            return missed(name, "done", "its layers share their parameters already")
        text = (
            f"layers {span.start} to {span.stop - 1} read the parameters of layer "
            f"{span.start}: {saved / 1e6:.2f} MB of {count} others are not read"
        )
        return applied(name, text, bytes=saved, parameters=count)

    def _read_first(self, first: StackLayer, other: StackLayer) -> tuple[int, int]:
        """Return the bytes and the number of parameters that ``other`` gave up."""
        others = {own: new for own, new in pairs(first, other) if own is not new}
        uses = [use for use in other.uses if use.parameter in others]
        uses = [use for use in uses if not matches(use, self.untied)]
        saved = read_instead(uses, others)
        return saved, len({use.parameter for use in uses})
