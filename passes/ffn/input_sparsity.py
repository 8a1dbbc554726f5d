"""TEAL and CATS: a decoding step skips the weights that its token hardly uses."""

from __future__ import annotations

from graphopt.ir.model_graph import ModelGraph
from graphopt.passes.base import PassContext, PassResult
from graphopt.passes.ffn.options import NeuronOptions


def rewrite(
    model: ModelGraph, options: NeuronOptions, context: PassContext
) -> PassResult:
    """Put sparse products in the place of linears of a decoding step."""
    return PassResult(False)
