"""Linears in int8: codes of activations, weights, and the float shadow of outliers."""

from graphopt.ops.int8.codes import constants, quantize
from graphopt.ops.int8.linear import int8_linear, shadow_linear

__all__ = ["constants", "int8_linear", "quantize", "shadow_linear"]
