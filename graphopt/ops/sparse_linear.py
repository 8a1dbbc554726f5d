"""``graphopt::sparse_linear``: a linear that skips the weights of small inputs (TEAL).

input [..., K] with few rows, weight [N, K] ([K, N] where ``transposed``), bias [N] or
None, ``threshold`` float32 []; result [..., N] = weight x + bias, where x is the input
with everything of a magnitude up to the threshold taken as zero (Liu et al. 2024,
TEAL, section 4). Columns of the weight that no row needs are not read. To be skipped, a
column must lie in one piece: a weight [N, K] is kept a second time as [K, N], made at
the first call and anew when the weight changes. Sums are float32; each is made in one
order, however many threads or rows there are.

The threshold is a tensor, so that layers that differ in it alone are the same code.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.codegen.cpp import sparse_linear as cpp
from graphopt.ops.prepared import Prepared

_library = torch.library.Library("graphopt", "FRAGMENT")
_library.define(
    "sparse_linear(Tensor input, Tensor weight, Tensor? bias, Tensor threshold, "
    "bool transposed=False) -> Tensor"
)
_library.define(
    "sparse_columns(Tensor input, Tensor weight, Tensor? bias, Tensor threshold, "
    "bool transposed) -> Tensor"
)
_library.define("thresholds(float[] values, Device device) -> Tensor")

prepared = Prepared(lambda weight: weight.t().contiguous())
_prepared_stored = Prepared(lambda weight: weight.contiguous())


def kept(x: Tensor, threshold: Tensor) -> Tensor:
    """Tell which elements of ``x`` exceed the threshold in magnitude; NaN does."""
    wide = torch.promote_types(x.dtype, torch.float32)
    return ~(x.to(wide).abs() <= threshold)


def sparse_linear_reference(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    threshold: Tensor,
    transposed: bool = False,
) -> Tensor:
    """Compute it densely, on any device; arguments as in the module."""
    large = input.where(kept(input, threshold), 0)
    return F.linear(large, weight.t() if transposed else weight, bias)


def is_served(supports: bool, input: Tensor) -> bool:
    """Tell whether a kernel takes ``input``: over more rows dense products pay."""
    width = input.shape[-1]
    return supports and width > 0 and input.numel() <= cpp.MOST_ROWS * width


def _input_major(weight: Tensor, transposed: bool) -> Tensor:
    if not transposed:
        return prepared(weight)
    return weight if weight.stride(1) == 1 else _prepared_stored(weight)


def _columns(kernel: Any, *inputs: Any) -> Tensor:
    input, weight, bias, threshold, transposed = inputs
    if not is_served(kernel.supports(input.dtype), input):
        return sparse_linear_reference(*inputs)
    by_input = _input_major(weight, transposed)
    bias = None if bias is None else bias.contiguous()
    result: Tensor = kernel.columns(input.contiguous(), by_input, bias, threshold)
    return result


@torch.library.impl(_library, "sparse_columns", "CPU")
def _cpu(*inputs: Any) -> Tensor:
    return _columns(cpp, *inputs)


@torch.library.impl(_library, "sparse_columns", "CUDA")
def _cuda(*inputs: Any) -> Tensor:
    from graphopt.codegen.triton import sparse_linear as kernel

    return _columns(kernel, *inputs)


@torch.library.register_fake("graphopt::sparse_columns", lib=_library)
def _(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    threshold: Tensor,
    transposed: bool,
) -> Tensor:
    return input.new_empty(*input.shape[:-1], weight.shape[1 if transposed else 0])


class _SparseLinear(torch.autograd.Function):
    """The operator with its derivatives."""

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        result: Tensor = torch.ops.graphopt.sparse_columns.default(*inputs)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, weight, _, threshold, ctx.transposed = inputs
        ctx.save_for_backward(input, weight, threshold)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, threshold = ctx.saved_tensors
        large, wanted = kept(input, threshold), ctx.needs_input_grad
        found: list[Tensor | None] = [None] * 5
        rows = grad.reshape(-1, grad.shape[-1])
        plain = weight.t() if ctx.transposed else weight
        if wanted[0]:
            found[0] = (grad @ plain).where(large, 0)
        if wanted[1]:
            by_output = rows.t() @ input.where(large, 0).reshape(-1, input.shape[-1])
            found[1] = by_output.t() if ctx.transposed else by_output
        if wanted[2]:
            found[2] = rows.sum(0)
        return tuple(found)


def needs_gradient(inputs: tuple[Any, ...]) -> bool:
    """Tell whether a derivative may be asked for."""
    tensors = (t for t in inputs if isinstance(t, Tensor))
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


def sparse_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    threshold: Tensor,
    transposed: bool = False,
) -> Tensor:
    """Return [..., N]; arguments as in the module."""
    inputs = (input, weight, bias, threshold, transposed)
    if needs_gradient(inputs):
        result: Tensor = _SparseLinear.apply(*inputs)
        return result
    return _SparseLinear.forward(*inputs)


# Decomposed where it is traced: an operator with derivatives of its own takes 5 us more
# a call, which a decoding step makes some hundred of.
torch.library.impl(_library, "sparse_linear", "CompositeImplicitAutograd")(
    sparse_linear
)


@cache
def _held(values: tuple[float, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, dtype=torch.float32, device=device)


def thresholds(values: list[float], device: torch.device) -> Tensor:
    """Return ``values`` as float32 [len(values)] on ``device``."""
    return _held(tuple(values), device).clone()


torch.library.impl(_library, "thresholds", "CompositeExplicitAutograd")(thresholds)


@torch.library.register_fake("graphopt::thresholds", lib=_library)
def _(values: list[float], device: torch.device) -> Tensor:
    return torch.empty(len(values), dtype=torch.float32, device=device)
