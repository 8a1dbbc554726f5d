"""CoreInfer: a prompt's core neurons serve all its decoding steps."""

from __future__ import annotations

from graphopt.ir.model_graph import ModelGraph
from graphopt.passes.base import PassContext, PassResult
from graphopt.passes.ffn.options import NeuronOptions


def rewrite(
    model: ModelGraph, options: NeuronOptions, context: PassContext
) -> PassResult:
    """Count in a prefill, and decode on what was counted."""
    return PassResult(False)
