"""Put int8 linears in the place of float ones."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import fx

from graphopt._compat import fake_mode_of, keep_outputs
from graphopt.ir.match import value_of
from graphopt.ir.replace import call, item, substitute
from graphopt.ir.sites.linear import LinearSite
from graphopt.passes.linear.int8_settings import InputSetting


@dataclass(frozen=True)
class Kept:
    """Shares of a call's outliers and of float columns in memory; weights on a file."""

    capacity: float
    hot: float
    on_file: bool


def rewrite_weights(
    gm: fx.GraphModule, sites: Sequence[LinearSite], kept: Kept
) -> None:
    """Replace each of ``sites`` by a product of its input with codes of the weight."""
    coded = _coded_weights(gm, sites, kept)
    for site in sites:
        codes, scales = coded[site.weight, site.transposed]
        with gm.graph.inserting_before(site.node):
            op = torch.ops.graphopt.weight_only_linear.default
            node = call(gm.graph, op, (site.input, codes, site.bias, scales))
        substitute(gm, site.node, node)


def _coded_weights(
    gm: fx.GraphModule, sites: Sequence[LinearSite], kept: Kept
) -> dict[tuple[fx.Node, bool], tuple[fx.Node, fx.Node]]:
    """Insert codes and scales of all weights, each once, in front of all layers."""
    wanted = list(dict.fromkeys((site.weight, site.transposed) for site in sites))
    if not wanted:
        return {}
    op = torch.ops.graphopt.coded_weights.default
    keep_outputs(op)
    weights = [weight for weight, _ in wanted]
    inputs = gm.graph.find_nodes(op="placeholder")
    with gm.graph.inserting_after(inputs[-1]):
        args = (weights, [flag for _, flag in wanted], kept.on_file)
        table = gm.graph.call_function(op, args)
    with fake_mode_of(gm):
        table.meta["example_value"] = op([value_of(w) for w in weights], *args[1:])
    for weight in weights:
        if weight.op == "get_attr":
            table.prepend(weight)
    with gm.graph.inserting_before(table.next):
        items = [item(gm.graph, table, i) for i in range(2 * len(wanted))]
    return dict(zip(wanted, zip(items[::2], items[1::2], strict=True), strict=True))


def rewrite_linears(
    gm: fx.GraphModule,
    sites: Sequence[tuple[LinearSite, InputSetting | None]],
    kept: Kept,
) -> list[str]:
    """Replace each of ``sites`` and say by what, in order.

    The settings stand in one table in front of all layers, so that layers stay alike;
    an input that several linears share is coded once. A site without a setting gets a
    scale a token, at run time.
    """
    devices = {value_of(site.input).device for site, _ in sites}
    gpus = [device for device in devices if device.type != "cpu"]
    wanted = {setting: None for _, setting in sites if setting is not None}
    rows = _rows(gm, wanted, gpus if len(gpus) == 1 else [])
    codes: dict[tuple[fx.Node, InputSetting], fx.Node] = {}
    texts = []
    for site, setting in sites:
        with gm.graph.inserting_before(site.node):
            if setting is None:
                node, text = _dynamic(gm.graph, site, kept), "int8, a scale a token"
            else:
                if (site.input, setting) not in codes:
                    codes[site.input, setting] = _coded(
                        gm.graph, site.input, rows[setting]
                    )
                coded = codes[site.input, setting]
                node = _static(gm.graph, site, coded, rows[setting], kept)
                shadow = "with" if setting.shadow else "without"
                text = f"int8, scale {setting.scale:.4g}, {shadow} a shadow"
        substitute(gm, site.node, node)
        texts.append(text)
    return texts


def _rows(
    gm: fx.GraphModule, settings: Iterable[InputSetting], device: list[torch.device]
) -> dict[InputSetting, fx.Node]:
    """Insert the table of ``settings`` and return the node of each one's row.

    ``device``: the GPU on which kernels read it; none for the CPU, and where there are
    several: their kernels take it from there.
    """
    wanted = list(settings)
    if not wanted:
        return {}
    values = [x for s in wanted for x in (s.scale, float(s.shadow))]
    inputs = gm.graph.find_nodes(op="placeholder")
    with gm.graph.inserting_after(inputs[-1]):
        table = gm.graph.call_function(
            torch.ops.graphopt.constants.default, (values, 2, *device)
        )
    with fake_mode_of(gm):
        table.meta["example_value"] = torch.empty(
            len(wanted), 2, device=device[0] if device else None
        )
    found, last = {}, table
    for index, setting in enumerate(wanted):
        with gm.graph.inserting_after(last):
            args = (table, 0, index)
            last = call(gm.graph, torch.ops.aten.select.int, args)
        found[setting] = last
    return found


def _coded(graph: fx.Graph, input: fx.Node, row: fx.Node) -> fx.Node:
    return call(graph, torch.ops.graphopt.quantize.default, (input, row))


def _static(
    graph: fx.Graph, site: LinearSite, codes: fx.Node, row: fx.Node, kept: Kept
) -> fx.Node:
    width = int(value_of(site.weight).shape[0 if site.transposed else 1])
    operands = (site.input, site.weight, site.bias, codes, row)
    room = (kept.capacity, max(1, round(kept.hot * width)))
    args = (*operands, *room, site.transposed, kept.on_file)
    return call(graph, torch.ops.graphopt.shadow_linear.default, args)


def _dynamic(graph: fx.Graph, site: LinearSite, kept: Kept) -> fx.Node:
    operands = (site.input, site.weight, site.bias)
    args = (*operands, site.transposed, kept.on_file)
    return call(graph, torch.ops.graphopt.int8_linear.default, args)
