"""CoreInfer: a prompt's core neurons serve all its decoding steps."""

from __future__ import annotations

from typing import Any

import torch

from graphopt.cost import BATCH
from graphopt.errors import PassError
from graphopt.ir.model_graph import ModelGraph
from graphopt.ir.replace import call
from graphopt.ops.neurons import kept_neurons
from graphopt.passes.base import PassContext, PassResult
from graphopt.passes.ffn.counting import count_and_gather
from graphopt.passes.ffn.held import Held, find_held, refusal
from graphopt.passes.ffn.masking import compute_kept
from graphopt.passes.ffn.options import NeuronOptions
from graphopt.passes.ffn.predict import buffer_bytes, choices, dense_step, kept_step
from graphopt.remarks import Remark, analysis, applied, missed

_NO_CACHE = (
    "the graph has no graphopt.Cache with neurons: generate with past_key_values="
    "graphopt.Cache.from_config(config, model); a prompt under min_tokens decodes "
    "without them"
)


def rewrite(
    model: ModelGraph, options: NeuronOptions, context: PassContext
) -> PassResult:
    """Count in a prefill, and decode on what was counted."""
    if options.keep == 1.0 and not options.force:
        return PassResult(False, (missed("graph", "keeps-all", "keep = 1"),))
    sites = find_held(model)
    if not sites:
        return PassResult(False, (missed("graph", "cache", _NO_CACHE),))
    memory = _memory([held for held in sites if held.phase != "use"])
    remarks = [_visit(model, held, options, context) for held in sites]
    done = [h for h, r in zip(sites, remarks, strict=True) if r.kind == "applied"]
    if used := [held for held in done if held.phase == "use"]:
        _check(model, used)
    return PassResult(bool(done), (*remarks, *memory), {"sites": len(sites)})


def _visit(
    model: ModelGraph, held: Held, options: NeuronOptions, context: PassContext
) -> Remark:
    skips = context.device == "cpu"  # as buffers may not be full; see `compute_kept`
    if (why := refusal(held) or _unsuitable(held, options, skips)) is not None:
        return missed(held.place, *why)
    neurons = held.neurons
    if held.phase != "use":
        count_and_gather(model, held, options)
        text = f"chooses {held.kept} of {neurons} neurons for decoding"
        return applied(held.place, text, kept=held.kept, neurons=neurons)
    before, after = dense_step(held).at(1, 1), kept_step(held, skips).at(1, 1)
    try:
        compute_kept(model, held, skips)
    except PassError as error:
        return missed(held.place, "cannot-follow", str(error))
    names = ("mflop_before", "mb_before", "mflop", "mb")
    figures = dict(zip(names, (x / 1e6 for x in (*before, *after)), strict=True))
    text = f"computes {held.kept} of {neurons} neurons"
    return applied(held.place, text, kept=held.kept, neurons=neurons, **figures)


def _unsuitable(
    held: Held, options: NeuronOptions, skips: bool
) -> tuple[str, str] | None:
    neurons = held.neurons
    kept = kept_neurons(neurons, options.keep)
    if kept != held.kept:
        why = f"the cache keeps {held.kept} neurons and keep = {options.keep} is {kept}"
        return "cache", f"{why}: make both from one config"
    if (options.mode == "similarity") != (held.shares is not None):
        return "cache", "the cache has other clusters: make both from one config"
    if (options.buffers == "int8") != bool(held.scales):
        return (
            "cache",
            "the cache has buffers of another type: make both from one config",
        )
    if kept == neurons and not options.force:
        return "keeps-all", "every neuron is kept"
    attention = held.layer.attention
    if held.phase != "use" and attention.unsupported and attention.key_mask is None:
        return "padding", f"which tokens are real is unknown: {attention.unsupported}"
    rows, reads = choices(held), (kept_step(held, skips).bytes, dense_step(held).bytes)
    slower = rows.is_number and bool(reads[0] >= reads[1])
    if held.phase == "use" and slower and not options.force:
        return "slower", f"{rows} rows read {held.room} of {held.own} neurons each"
    return None


def _check(model: ModelGraph, used: list[Held]) -> None:
    """Insert that a step is an error where nothing was chosen."""
    graph = model.gm.graph
    first, *others = (held.indices for held in used)
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    with graph.inserting_after(inputs[-1]):
        args: Any = (first, others)
        call(graph, torch.ops.graphopt.check_neurons.default, args)


def _memory(sites: list[Held]) -> list[Remark]:
    """Report what the buffers take, in a graph that fills them."""
    fitting = [held for held in sites if refusal(held) is None]
    if not fitting:
        return []
    total = sum(buffer_bytes(held) for held in fitting)
    mb = float(total.subs(BATCH, 1)) / 1e6
    each = " a row of the batch" if total.has(BATCH) else ""
    kind = "int8 buffers" if fitting[0].scales else "buffers"
    text = f"the cache's {kind} of neurons take {mb:.4g} MB{each}"
    return [analysis("graph", "memory", text, mb=mb)]
