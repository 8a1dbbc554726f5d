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
    """Compute in decoding only the neurons of each FFN that the prompt has activated."""

    name: ClassVar[str] = "neuron-mask"
    source: ClassVar[str] = (
        "CoreInfer (Wang et al. 2024, definitions 1 and 2); TEAL (Liu et al. 2024); "
        "CATS (Lee et al. 2024)"
    )
    never_after: ClassVar[Mapping[str, str]] = {
        "chunked-prefill": "the layers are in a loop that knows nothing of a cache",
        "packed-prefill": "packed rows hold several prompts, whose neurons differ",
    }

    def run(self, model: ModelGraph, context: PassContext) -> PassResult:
        """Let the method's module rewrite ``model``."""
        module = import_module(f"graphopt.passes.ffn.{_MODULES[self.method]}")
        result: PassResult = module.rewrite(model, self, context)
        return result

    def cache_options(self) -> dict[str, Any] | None:
        """Return the arguments of the `graphopt.Cache` for this pass."""
        return None
