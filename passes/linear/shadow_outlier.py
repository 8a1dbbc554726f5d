"""`shadow-outlier`: linears in int8, with what int8 cannot hold in float beside it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import fx

from graphopt.errors import ConfigError
from graphopt.ir.collectives import is_collective
from graphopt.ir.constants import is_parameter, parameter_name
from graphopt.ir.match import value_of
from graphopt.ir.model_graph import ModelGraph
from graphopt.ir.sites.linear import LinearSite
from graphopt.ops.int8.weight_only import FEW_ROWS
from graphopt.passes.base import Pass, PassContext, PassResult, option
from graphopt.passes.linear.int8_settings import (
    InputSetting,
    Settings,
    read_settings,
)
from graphopt.passes.linear.int8_sites import (
    Kept,
    rewrite_linears,
    rewrite_weights,
)
from graphopt.remarks import Remark, analysis, applied, missed

# On a GPU the shadow reads columns of the float weight where the weight lies.
_ON_DEVICE = "float weights stay on the device beside the codes: no file on a GPU"

_Named = tuple[str, LinearSite, InputSetting | None]


@dataclass(frozen=True, kw_only=True)
class ShadowOutlier(Pass):
    """Multiply int8 codes by int8 weights, and in float what lies beyond the codes.

    Weights get one scale a row, activations one static scale, measured on real text by
    ``graphopt calibrate``. Few values of few channels lie far beyond the rest; a scale
    that held them would leave little for the others, so the codes clip them, and what
    is clipped is multiplied with the float columns of those channels and added (the
    shadow). The linears whose largest value is least beyond the clipped range
    (``prune`` of them) get a scale that holds everything instead, and no shadow. Pays
    in prefill where the processor multiplies int8 faster than float (VNNI: 3 to 5
    times), and in decoding, which reads a quarter of the bytes: linears over up to
    ``float_rows`` rows keep float activations and need no shadow, since they wait for
    the weights and not for products.

    Approximate; with ``layers = []`` nothing is rewritten. ``activations = "dynamic"``
    (a scale a token, found at run time; no shadow) and ``"float"`` (weights alone are
    codes; over many rows slower than float) are the baselines that need no calibration.
    With ``weights = "file"`` the float weights of the model move to an
    unnamed file at their first use, so that memory holds the codes; they can still be
    read as before, and the model's own forward works.

    Before::

        %y = linear(%x, %weight, %bias)

    After::

        %c = graphopt.constants([0.031, 1.0, ...], 2)
        %s = getitem(%c, 0)
        %q = graphopt.quantize(%x, %s)
        %y = graphopt.shadow_linear(%x, %weight, %bias, %q, %s, 0.05, 144, False, True)

    and over few rows::

        %w = graphopt.coded_weights([%weight, ...], [False, ...], True)
        %codes, %scales = getitem(%w, 0), getitem(%w, 1)
        %y = graphopt.weight_only_linear(%x, %codes, %bias, %scales)

    Refuses when

    - ``uncalibrated``: the file of ``scales`` has no range for the linear's input;
    - ``changes``: the weight is no parameter, so each call would turn it into codes;
    - ``sharded``: the linear's inputs are shared out over ranks, and its result summed;
    - ``layer``: the linear belongs to no layer of ``layers``; the LM head, whose error
      goes to the logits as it is, without ``head = true``;
    - ``unsupported``: the device is neither CPU nor CUDA, or operands of other types.
    """

    name: ClassVar[str] = "shadow-outlier"
    source: ClassVar[str] = "llm.npu (Xu et al. 2025), section 3.3"

    scales: str | None = option(None, "what graphopt calibrate wrote", "file")
    prune: Annotated[float, Field(ge=0, le=1)] = option(
        0.85, "share of the linears that have no shadow, the least important"
    )
    activations: Literal["static", "dynamic", "float"] = option(
        "static", "the codes' scale: measured before, of each token, or no codes"
    )
    float_rows: Annotated[int, Field(ge=0, le=FEW_ROWS)] = option(
        4, "most rows whose activations stay float, as in decoding", "rows"
    )
    layers: list[Annotated[int, Field(ge=0)]] | None = option(
        None, "layers that are rewritten; all when left out"
    )
    head: bool = option(False, "rewrite the LM head too")
    capacity: Annotated[float, Field(ge=0, le=1)] = option(
        0.05,
        "most of a call's values that have a shadow; with more it is made in float",
    )
    hot: Annotated[float, Field(ge=0, le=1)] = option(
        0.25, "share of a weight's float columns that stay in memory"
    )
    weights: Literal["file", "memory"] = option(
        "file", "where the float weights are once there are codes"
    )

    @model_validator(mode="after")
    def _check(self) -> Self:
        """A file that cannot be read is an error of the config, not of a graph."""
        if self.activations == "static" and self.scales is None:
            raise ConfigError(
                "shadow-outlier: static scales come from a file: write it by "
                "graphopt calibrate MODEL and name it as scales = 'calibration.toml', "
                "or use activations = 'dynamic' or 'float'"
            )
        self._settings()
        return self

    def _settings(self) -> Settings | None:
        if self.activations != "static" or self.scales is None:
            return None
        return read_settings(self.scales, self.prune)

    def run(self, model: ModelGraph, context: PassContext) -> PassResult:
        """Rewrite the linears of the layers, and the head if asked for."""
        wanted, settings = self._wanted(model), self._settings()
        remarks: list[Remark] = []
        sites: list[_Named] = []
        for index, site in enumerate(model.linears):
            name, setting = f"linear[{index}]", None
            refusal = self._refusal(site, wanted, context)
            if refusal is None and settings is not None:
                setting = settings.of(parameter_name(site.weight))
                refusal = None if setting else _uncalibrated(site)
            if refusal:
                remarks.append(missed(name, *refusal))
            else:
                sites.append((name, site, setting))
        on_cpu = context.device == "cpu"
        if sites and self.weights == "file" and not on_cpu:
            remarks.append(analysis("graph", "weights", _ON_DEVICE))
        remarks += self._rewrite(model, sites, on_cpu)
        return PassResult(bool(sites), tuple(remarks), {"sites": len(model.linears)})

    def _rewrite(
        self, model: ModelGraph, sites: list[_Named], has_file: bool
    ) -> list[Remark]:
        kept = Kept(self.capacity, self.hot, has_file and self.weights == "file")
        few = [site for _, site, _ in sites if self._keeps_activations(site)]
        many = [(site, x) for _, site, x in sites if site not in few]
        saved = {site.node: _bytes_saved(site, kept) for _, site, _ in sites}
        texts = {s.node: f"int8 weights over {s.rows} row(s)" for s in few}
        nodes = [site.node for site, _ in many]
        rewrite_weights(model.gm, few, kept)
        texts |= zip(nodes, rewrite_linears(model.gm, many, kept), strict=True)
        return [
            applied(name, texts[site.node], **saved[site.node])
            for name, site, _ in sites
        ]

    def _keeps_activations(self, site: LinearSite) -> bool:
        rows = site.rows
        is_few = isinstance(rows, int) and rows <= self.float_rows
        return (is_few or self.activations == "float") and not _is_trained(site)

    def _wanted(self, model: ModelGraph) -> set[fx.Node]:
        """Return the linears that are asked for: of some layers, or all but the head's.

        A graph whose attention another pass has rewritten may have no layers any more.
        """
        if self.layers is None:
            found = {site.node for site in model.linears}
        else:
            layers = [layer for layer in model.layers if layer.index in self.layers]
            found = {site.node for layer in layers for site in layer.linears}
        head = {model.head.logits} if model.head is not None else set()
        return found | head if self.head else found - head

    def _refusal(
        self, site: LinearSite, wanted: set[fx.Node], context: PassContext
    ) -> tuple[str, str] | None:
        if site.done:
            return "done", "another pass has rewritten the linear"
        if site.node not in wanted:
            return "layer", "it belongs to no layer that is rewritten"
        if context.device not in ("cpu", "cuda"):
            return "unsupported", f"there is no int8 kernel for {context.device}"
        if reason := site.unsupported():
            return "unsupported", reason
        if self.activations == "float" and _is_trained(site):
            why = "codes of weights have no derivatives: run under torch.no_grad()"
            return "unsupported", why
        if any(is_collective(user) for user in site.node.users):
            why = "each row's scale is over all inputs, of which this rank has a part"
            return "sharded", why
        if not is_parameter(site.weight):
            return "changes", "the weight is computed, so each call would code it anew"
        return None


def _is_trained(site: LinearSite) -> bool:
    """Tell whether the graph records derivatives, which codes of weights have not."""
    return torch.is_grad_enabled() and bool(value_of(site.weight).requires_grad)


def _uncalibrated(site: LinearSite) -> tuple[str, str]:
    name = parameter_name(site.weight) or "a weight without a name"
    return "uncalibrated", f"there is no range for the input of {name}"


def _bytes_saved(site: LinearSite, kept: Kept) -> dict[str, int]:
    """Codes that lie beside the float weight save no memory."""
    weight = value_of(site.weight)
    saved = int(weight.numel() * (weight.itemsize - 1))
    return {"bytes_saved": saved} if kept.on_file else {}
