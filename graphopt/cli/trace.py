"""Trace a model and run the passes, without computing or compiling anything.

Dynamo runs under fake tensors: sizes and dtypes go through the model, numbers do not,
so a prompt of 100,000 tokens is explained as fast as a short one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx
from torch._dynamo.exc import TorchDynamoException
from torch.fx.experimental.symbolic_shapes import statically_known_true

from graphopt.backend import rewrite
from graphopt.cli.decode_cost import step_figures
from graphopt.cli.example_inputs import encoder_in_graph, example_inputs
from graphopt.cli.kernels import kernel_spec
from graphopt.cli.layer_cost import SizesAt, layer_costs
from graphopt.cli.site_cost import site_figures
from graphopt.codegen.triton.spec import AttentionSpec
from graphopt.errors import GraphoptError, ModelError
from graphopt.ir.attention.pages import PagedSite, PlacedSite, read_of
from graphopt.ir.attention.site import AttentionSite
from graphopt.ir.dce import eliminate_dead_code
from graphopt.ir.model_graph import ModelGraph
from graphopt.ir.vision.span import LanguageGraph
from graphopt.options import BackendOptions, parse_options
from graphopt.report import CompileReport
from graphopt.runtime.cache import Cache, wanted_by


@dataclass
class Traced:
    """The report of each graph, and the predicted cost of its sites and layers."""

    reports: list[CompileReport] = field(default_factory=list)
    costs: list[list[dict[str, Any]]] = field(default_factory=list)
    layers: list[list[dict[str, Any]]] = field(default_factory=list)
    kernels: set[AttentionSpec] = field(default_factory=set)
    reads_pages: bool = False
    device: str = "cpu"


def trace(
    model: torch.nn.Module, config: str | None, tokens: int, use_cache: bool = True
) -> Traced:
    """Return what graphopt makes of a prefill of ``tokens`` tokens, batch 1.

    ``use_cache`` keeps keys and values, where the model can generate.
    Raises ConfigError for the config and ModelError when Dynamo cannot trace the model.
    """
    found = Traced(device="cuda" if torch.cuda.is_available() else "cpu")
    options = parse_options({"config": config})
    backend = _recorder(found, options, tokens)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend=backend, dynamic=True)
    try:
        with _fake_mode(), torch.no_grad(), encoder_in_graph():
            inputs = example_inputs(model, tokens)
            if "use_cache" in inputs:
                inputs["use_cache"] = use_cache
            if "pixel_values" in inputs and "input_ids" in inputs:
                model(**inputs)  # its hooks would break the graph
            _run(compiled, inputs, config)
    except (TorchDynamoException, RuntimeError, ValueError, TypeError) as error:
        inner = getattr(error, "inner_exception", None)
        if isinstance(inner, GraphoptError):
            raise inner from error
        cause = str(inner or error).strip().splitlines()[0]
        raise ModelError(
            f"{type(model).__name__}: cannot be traced: {cause}"
        ) from error
    if not found.reports:
        raise ModelError(f"{type(model).__name__}: Dynamo captured no graph of it")
    return found


def _run(model: Any, inputs: dict[str, Any], config: str | None) -> None:
    """Trace a prefill, and a decoding step where passes act on one."""
    asked = wanted_by(config)
    if asked is None or not inputs.get("use_cache"):
        model(**inputs)
        return
    cache = Cache.from_config(config, model)
    model(**inputs, past_key_values=cache)
    token = {"input_ids": torch.zeros((1, 1), dtype=torch.int64)}
    step = {k: v for k, v in inputs.items() if k != "pixel_values"} | token
    model(**step, past_key_values=cache)


def _fake_mode() -> Any:
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


def _recorder(
    found: Traced, options: BackendOptions, tokens: int
) -> Callable[[fx.GraphModule, list[Any]], Callable[..., Any]]:
    def backend(gm: fx.GraphModule, inputs: list[Any]) -> Callable[..., Any]:
        eliminate_dead_code(gm)  # what no output needs costs nothing
        model = LanguageGraph(gm)
        at = SizesAt(model, tokens)
        copied = {s.index for s in model.attention if read_of(s) is not None}
        # Before the passes: they may write other sizes into the nodes of these sites.
        costs, layers = _costs(model, at, copied), _layer_costs(model, at)
        report, _ = rewrite(gm, options)
        after = LanguageGraph(gm)
        rewritten = [s for s in after.attention if s.form == "op"]
        found.reads_pages |= any(isinstance(s, PagedSite) for s in rewritten)
        found.kernels |= {
            kernel_spec(site)
            for site in rewritten
            if not isinstance(site, (PagedSite, PlacedSite))
        }
        found.reports.append(report)
        found.costs.append(_beside(costs, _costs(after, at, copied), "site"))
        found.layers.append(_beside(layers, _layer_costs(after, at), "layer"))
        return gm.forward

    return backend


def _costs(model: ModelGraph, at: SizesAt, copied: set[int]) -> list[dict[str, Any]]:
    return [
        {"site": f"attention[{site.index}]", **_figures(site, at, copied)}
        for site in model.attention
    ]


def _figures(site: AttentionSite, at: SizesAt, copied: set[int]) -> dict[str, Any]:
    if isinstance(site, PlacedSite) or statically_known_true(site.query_len == 1):
        return step_figures(site, at.tokens, site.index in copied)
    return site_figures(site, at.of(site.query_len))


def _layer_costs(model: ModelGraph, at: SizesAt) -> list[dict[str, Any]]:
    return [] if model.kind in ("decode", "unknown") else layer_costs(model, at)


def _beside(
    before: list[dict[str, Any]], after: list[dict[str, Any]], name: str
) -> list[dict[str, Any]]:
    """Return rows with each figure before and after; ``name`` says what a row is of.

    What the passes took out of the graph costs as before.
    """
    left = {row[name]: row for row in after}
    return [
        {name: row[name]}
        | {
            f"{key}_{when}": side[key]
            for key in row
            if key != name
            for when, side in (("before", row), ("after", left.get(row[name], row)))
        }
        for row in before
    ]
