"""`neuron-mask`: decoding computes the neurons that matter, and not the others."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from typing import Any, ClassVar

from graphopt.ir.model_graph import ModelGraph
from graphopt.passes.base import PassContext, PassResult
from graphopt.passes.ffn.options import NeuronOptions

# Each has rewrite(model, options, context) -> PassResult.
_MODULES = {"core": "core", "teal": "input_sparsity", "cats": "input_sparsity"}


@dataclass(frozen=True, kw_only=True)
class NeuronMask(NeuronOptions):
    """Compute in decoding only the neurons of each FFN that the text activates.

    ``core`` (CoreInfer): the prompt runs densely, and in the layers chosen, the middle
    ones by default, each token counts for the ``token_ratio`` of its active neurons
    that are greatest. The ``keep`` of the neurons that most tokens count for are the
    prompt's core; their rows of the gate and up projections and columns of the down
    projection are copied to buffers of `graphopt.Cache`, and decoding computes with
    those alone. The buffers have one shape and place for all prompts, so one graph
    serves them; each cache has its own. In a batch all rows share a core, that of their
    counts together, or have one ``each``, whose weights are read row by row.
    Approximate; reads ``keep`` of the layers' weights, which is what a decoding step
    waits for. It suits prompts like the text that follows (summaries, extraction,
    examples): the core of a bare question is known to fail, so prompts under
    ``min_tokens`` stay dense, by a graph of their own that is not touched at all; of a
    padded batch the longest prompt decides. Texts that drift away from their prompt
    want ``refresh``: every so many tokens one runs densely and counts for as many, and
    the core is chosen again. With ``similarity`` it is that of the nearest of some
    clusters of texts (`graphopt cluster`), in each layer by itself.
    Where ranks share neurons out, all of them are ranked, as on one process: each rank
    keeps those of the core that it has, and has room for the most that these can be. A
    CPU reads what is there; a GPU reads the room, so it gains less.
    ``Cache.from_config(config, model)`` makes the cache. With ``buffers = "int8"`` the
    copies are codes with a float32 scale each output, a quarter of float32's bytes.
    A ``shadow-outlier`` behind this pass turns into int8 what stays a plain linear: all
    of the prompt's graph, whose float weights are still gathered, and the rest of a
    step's.

    ``teal`` and ``cats`` choose for each token, and only in decoding steps of up to 8
    rows; prompts stay dense, any cache will do. ``teal`` takes the small inputs of all
    linears of a layer as zero and does not read their columns of the weights; ``cats``
    leaves out the neurons whose gate is nearly closed, so it reads less of the up and
    down projections alone. What is small comes from ``thresholds``, the magnitudes that
    the share ``sparsity`` of a linear's inputs (of an FFN's gates) did not exceed on
    real text; ``levels`` (TEAL's greedy choice, `graphopt levels`) give each linear a
    share of its own. In a batch a weight is read if any row needs it. To be skipped,
    columns must lie in one piece: a second copy of the weights is made, and the remarks
    say how large it is. With ``sparsity = 0`` nothing is rewritten.

    Before::

        %g = linear(%x, %gate) : f32[B, 1, F]
        %h = mul(silu(%g), linear(%x, %up))
        %y = linear(%h, %down)

    After, in the prompt's graph and in that of a decoding step::

        graphopt.count_neurons(%h, %mask, %counts, 2000, True)
        graphopt.choose_neurons(%counts, %indices)
        graphopt.gather_neurons(%gate, %indices, %gate_c, 0)

        %g = linear(%x, %gate_c) : f32[B, 1, 0.4 F]
        %h = mul(silu(%g), linear(%x, %up_c))
        %y = linear(%h, %down_c)

    With int8 buffers::

        graphopt.gather_codes(%gate, %indices, %gate_c, %gate_s, 0)
        %g = graphopt.weight_only_linear(%x, %gate_c, None, %gate_s)

    After, by ``cats`` (``teal``: every linear as the last)::

        %h = graphopt.sparse_up(%x, %up, None, silu(%g), %threshold)
        %y = graphopt.sparse_linear(%h, %down, None, %zero, False)

    Refuses when

    - ``cache``: the graph has no `graphopt.Cache` that keeps neurons, or one that was
      made from other options or for another model;
    - ``keeps-all``: every neuron is kept;
    - ``no-ffn``: the layer has no feed-forward network, or several (experts);
    - ``done``: another pass has rewritten its linears;
    - ``padding``: which tokens of the prompt are real cannot be told;
    - ``slower``: rows that choose for themselves would read more than all weights once;
      what a small weight's skipped part saves is less than a call costs;
    - ``sharded``: which part of the neurons this rank has cannot be told;
    - ``cannot-follow``: what lies between the projections needs all neurons.

    ``teal`` and ``cats`` refuse, further, when

    - ``not-decode``, ``many-rows``: more than one token each, or over 8 rows, or a
      number that changes (compile with ``dynamic=None``);
    - ``dense``: the sparsity, or the linear's level, is 0;
    - ``not-raised``: the layer's ends in the residual stream were not found;
    - ``changes``: a weight is computed, so that nothing is known of its input;
    - ``unsupported``: operands of other types; for ``cats``, an FFN without a gate or
      with a gate fused into the up projection.
    """

    name: ClassVar[str] = "neuron-mask"
    source: ClassVar[str] = (
        "CoreInfer (Wang et al. 2024, definitions 1 and 2); TEAL (Liu et al. 2024); "
        "CATS (Lee et al. 2024)"
    )
    never_after: ClassVar[Mapping[str, str]] = {
        "chunked-prefill": "the layers are in a loop that knows nothing of a cache",
        "packed-prefill": "packed rows hold several prompts, whose neurons differ",
        "shadow-outlier": "its linears read codes, and neurons are found and gathered "
        "where weights are float; name neuron-mask first",
    }

    def run(self, model: ModelGraph, context: PassContext) -> PassResult:
        """Let the method's module rewrite ``model``."""
        module = import_module(f"graphopt.passes.ffn.{_MODULES[self.method]}")
        result: PassResult = module.rewrite(model, self, context)
        return result

    def cache_options(self) -> dict[str, Any] | None:
        """Return what `graphopt.Cache.from_config` needs for this pass."""
        if self.method != "core":
            return None
        rule = {
            "keep": self.keep,
            "layers": self.layers,
            "clusters": self.clusters,
            "each": self.rows == "each",
            "min_tokens": self.shortest,
            "refresh": self.refresh or 0,
            "force": self.force,
            "buffers": self.buffers,
            "counted": {"token_ratio": self.token_ratio, "criterion": self.criterion},
        }
        return {"masking": rule}
