"""Linears in int8: codes of activations, weights, and the float shadow of outliers."""

from graphopt.ops.int8 import cuda, cuda_rows  # noqa: F401  (register kernels)
from graphopt.ops.int8.codes import constants, quantize
from graphopt.ops.int8.linear import int8_linear, shadow_linear
from graphopt.ops.int8.weight_only import coded_weights, weight_only_linear

__all__ = [
    "coded_weights",
    "constants",
    "int8_linear",
    "quantize",
    "shadow_linear",
    "weight_only_linear",
]
