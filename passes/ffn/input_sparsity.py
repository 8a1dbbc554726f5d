"""TEAL and CATS: a decoding step skips the weights that its token hardly uses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from graphopt.calibration import Calibration
from graphopt.ir.match import value_of
from graphopt.ir.model_graph import ModelGraph
from graphopt.ir.sites.linear import LinearSite
from graphopt.ir.stream.layers import Layer
from graphopt.passes.base import PassContext, PassResult
from graphopt.passes.ffn.options import NeuronOptions
from graphopt.passes.ffn.sparse_rule import Calibrated, Rule, read_levels
from graphopt.passes.ffn.sparse_sites import (
    GatedSite,
    Thresholds,
    gated_site,
    skip_columns,
    skip_neurons,
)
from graphopt.remarks import Remark, applied, missed


def rewrite(
    model: ModelGraph, options: NeuronOptions, context: PassContext
) -> PassResult:
    """Put sparse products in the place of linears of a decoding step.

    TEAL (Liu et al. 2024) leaves out the small inputs of every linear of a layer, CATS
    (Lee et al. 2024) the neurons whose gate is nearly closed.
    """
    if options.sparsity == 0:
        return _nothing("dense", "sparsity 0 leaves nothing out")
    if model.kind not in ("decode", "mixed"):
        return _nothing("not-decode", f"its {model.tokens} tokens share the weights")
    assert options.thresholds is not None  # which the options see to
    found = Calibration.read(options.thresholds)
    return sparsify(model, options, context, found)


def sparsify(
    model: ModelGraph,
    options: NeuronOptions,
    context: PassContext,
    calibrated: Calibrated,
) -> PassResult:
    """Rewrite a decoding graph with the thresholds of ``calibrated``."""
    path, sparsity = options.levels, options.sparsity
    levels = None if path is None else read_levels(path, sparsity)
    mixed = model.kind == "mixed"
    rule = Rule(sparsity, options.force, context.device, calibrated, levels, mixed)
    layers = _layers(model, options)
    sites: Sequence[_Choice] = (
        [*_teal(layers, rule)] if options.method == "teal" else [*_cats(layers, rule)]
    )
    chosen = [c for c in sites if c.rewritten]
    if chosen:
        device = value_of(chosen[0].linears[0].weight).device
        _apply(model, chosen, Thresholds(model.gm, device))
    remarks = tuple(c.remark for c in sites)
    return PassResult(bool(chosen), remarks, {"sites": len(sites)})


def _nothing(code: str, reason: str) -> PassResult:
    return PassResult(False, (missed("graph", code, reason),))


def _layers(model: ModelGraph, options: NeuronOptions) -> list[Layer]:
    wanted = options.layers
    return [x for x in model.layers if wanted is None or x.index in wanted]


@dataclass(frozen=True)
class _Choice:
    """What is done at a site: rewritten with ``threshold``, or left alone."""

    remark: Remark
    linears: tuple[LinearSite, ...] = ()
    threshold: float = 0.0
    gated: GatedSite | None = None

    @property
    def rewritten(self) -> bool:
        return self.remark.kind == "applied"


def _teal(layers: Sequence[Layer], rule: Rule) -> Iterator[_Choice]:
    for layer in layers:
        if not layer.linears:
            text = "its ends in the residual stream were not found"
            yield _Choice(missed(f"layer[{layer.index}]", "not-raised", text))
        for index, site in enumerate(layer.linears):
            place = f"layer[{layer.index}].linear[{index}]"
            if refusal := rule.refusal([site]):
                yield _Choice(missed(place, *refusal))
                continue
            threshold = rule.threshold("input", site)
            text = f"leaves out inputs up to {threshold:.3g}"
            yield _choice(place, text, (site,), threshold, None)


def _cats(layers: Sequence[Layer], rule: Rule) -> Iterator[_Choice]:
    for layer in layers:
        for index, ffn in enumerate(layer.ffn):
            place = f"layer[{layer.index}].ffn[{index}]"
            site = gated_site(ffn, layer.linears)
            if isinstance(site, tuple):
                yield _Choice(missed(place, *site))
            elif refusal := rule.refusal(site.linears()):
                yield _Choice(missed(place, *refusal))
            else:
                threshold = rule.threshold("gate", site.down)
                text = f"leaves out neurons whose gate is up to {threshold:.3g}"
                yield _choice(place, text, site.linears(), threshold, site)


def _choice(
    place: str,
    text: str,
    linears: tuple[LinearSite, ...],
    threshold: float,
    gated: GatedSite | None,
) -> _Choice:
    copied = [x for x in linears[-1:] if not x.transposed]
    size = sum(value_of(x.weight).nbytes for x in copied)
    text += f"; a second copy of {size / 1e6:.1f} MB, by input" if size else ""
    figures: dict[str, Any] = {"threshold": threshold, "bytes": size}
    return _Choice(applied(place, text, **figures), linears, threshold, gated)


def _apply(model: ModelGraph, chosen: Sequence[_Choice], table: Thresholds) -> None:
    """All elements are asked for before the first is used: the table holds them all."""
    numbers = []
    for choice in chosen:
        source = choice.linears[0].input
        zero = table.want(source, 0.0) if choice.gated is not None else -1
        numbers.append((table.want(source, choice.threshold), zero))
    for choice, (number, zero) in zip(chosen, numbers, strict=True):
        node = table.node(number)
        if choice.gated is not None:
            skip_neurons(model.gm, choice.gated, node, table.node(zero))
        else:
            skip_columns(model.gm, choice.linears[0], node)
