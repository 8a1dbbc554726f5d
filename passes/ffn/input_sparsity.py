"""TEAL and CATS: a decoding step skips the weights that its token hardly uses."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Protocol

import torch

from graphopt.calibration import Calibration
from graphopt.codegen.cpp.sparse_linear import MOST_ROWS
from graphopt.ir.constants import is_parameter, parameter_name
from graphopt.ir.match import value_of
from graphopt.ir.model_graph import ModelGraph
from graphopt.ir.sites.linear import LinearSite
from graphopt.ir.stream.layers import Layer
from graphopt.passes.base import PassContext, PassResult
from graphopt.passes.ffn.options import NeuronOptions
from graphopt.passes.ffn.sparse_sites import (
    GatedSite,
    Thresholds,
    gated_site,
    skip_columns,
    skip_neurons,
)
from graphopt.remarks import Remark, applied, missed

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Bytes a second at which dense products read weights, and seconds that a call of a
# sparse one takes beside reading (benchmarks/sparse_linear.py).
_RATE = {"cpu": 25e9, "cuda": 2.5e12}
_CALL = {"cpu": 10e-6, "cuda": 6e-6}


class Calibrated(Protocol):
    """What is known of a model's activations; `graphopt.calibration.Calibration`."""

    def threshold(self, kind: str, name: str, sparsity: float) -> float:
        """Return the magnitude that the share ``sparsity`` of values do not exceed."""
        ...


def rewrite(
    model: ModelGraph, options: NeuronOptions, context: PassContext
) -> PassResult:
    """Put sparse products in the place of linears of a decoding step.

    TEAL (Liu et al. 2024) leaves out the small inputs of every linear of a layer, CATS
    (Lee et al. 2024) the neurons whose gate is nearly closed.
    """
    if options.sparsity == 0:
        return _nothing("dense", "sparsity 0 leaves nothing out")
    if model.kind != "decode":
        return _nothing("not-decode", f"its {model.tokens} tokens share the weights")
    assert options.thresholds is not None  # which the options see to
    found = read_calibration(options.thresholds)
    return sparsify(model, options, context, found)


@cache
def read_calibration(path: str) -> Calibration:
    """Read a calibration once for all graphs of a process."""
    return Calibration.read(path)


def sparsify(
    model: ModelGraph,
    options: NeuronOptions,
    context: PassContext,
    calibrated: Calibrated,
) -> PassResult:
    """Rewrite a decoding graph with the thresholds of ``calibrated``."""
    rule = _Rule(options.sparsity, options.force, context.device, calibrated)
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


@dataclass(frozen=True)
class _Rule:
    """Which sites are rewritten, and with which thresholds."""

    sparsity: float
    force: bool
    device: str
    calibrated: Calibrated

    def refusal(self, linears: Sequence[LinearSite]) -> tuple[str, str] | None:
        for site in linears:
            if reason := _unfit(site):
                return reason
        return None if self.force else self._slower(linears)

    def threshold(self, kind: str, linear: LinearSite) -> float:
        name = parameter_name(linear.weight)
        return self.calibrated.threshold(kind, name, self.sparsity)

    def _slower(self, linears: Sequence[LinearSite]) -> tuple[str, str] | None:
        """A column is read if any row keeps it; rows keep them by chance."""
        read = 1 - self.sparsity ** linears[0].rows
        size = sum(value_of(x.weight).nbytes for x in linears)
        rate, call = _RATE.get(self.device, 0.0), _CALL.get(self.device, 0.0)
        if size * (1 - read) > rate * call * len(linears):
            return None
        return "slower", f"{read:.0%} of {size / 1e6:.2g} MB would be read"


def _unfit(site: LinearSite) -> tuple[str, str] | None:
    if site.done:
        return "done", "another pass has rewritten the linear"
    if reason := site.unsupported():
        return "unsupported", reason
    if (dtype := value_of(site.weight).dtype) not in _DTYPES:
        return "unsupported", f"there is no kernel for {dtype}"
    if not is_parameter(site.weight) or not parameter_name(site.weight):
        return "changes", "the weight is computed, so nothing is known of its input"
    rows = site.rows
    if not isinstance(rows, int) or rows > MOST_ROWS:
        return "many-rows", f"{rows} rows share the weights; at most {MOST_ROWS} may"
    return None


def _teal(layers: Sequence[Layer], rule: _Rule) -> Iterator[_Choice]:
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


def _cats(layers: Sequence[Layer], rule: _Rule) -> Iterator[_Choice]:
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
