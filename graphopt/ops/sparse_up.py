"""``graphopt::sparse_up``: gate times up, computed where the gate is open (CATS).

input [..., K] with few rows, weight [N, K], bias [N] or None, gate [..., N] (the
activated gate projection), ``threshold`` float32 []; result [..., N] = gate (input @
weight^T + bias) where the gate's magnitude exceeds the threshold, zero elsewhere (Lee
et al. 2024, CATS, section 3). Rows of the weight that no row of the input needs are not
read. Behind it, a `graphopt.ops.sparse_linear` of threshold 0 skips the same neurons of
the down projection. Sums are float32 and rounded before the gate is multiplied, as in
separate operators; each is made in one order, however many threads or rows there are.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.codegen.cpp import sparse_linear as cpp
from graphopt.ops.sparse_linear import is_served, kept, needs_gradient

_library = torch.library.Library("graphopt", "FRAGMENT")
_library.define(
    "sparse_up(Tensor input, Tensor weight, Tensor? bias, Tensor gate, "
    "Tensor threshold) -> Tensor"
)
_library.define(
    "sparse_neurons(Tensor input, Tensor weight, Tensor? bias, Tensor gate, "
    "Tensor threshold) -> Tensor"
)


def sparse_up_reference(
    input: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, threshold: Tensor
) -> Tensor:
    """Compute it densely, on any device; arguments as in the module."""
    return (gate * F.linear(input, weight, bias)).where(kept(gate, threshold), 0)


def _neurons(kernel: Any, *inputs: Any) -> Tensor:
    input, weight, bias, gate, threshold = inputs
    # A weight's rows lie in one piece, but for parts of a fused projection of others.
    plain = kernel.supports(input.dtype) and weight.stride(1) == 1
    if not is_served(plain, input):
        return sparse_up_reference(*inputs)
    bias = None if bias is None else bias.contiguous()
    result: Tensor = kernel.neurons(
        input.contiguous(), weight, bias, gate.contiguous(), threshold
    )
    return result


@torch.library.impl(_library, "sparse_neurons", "CPU")
def _cpu(*inputs: Any) -> Tensor:
    return _neurons(cpp, *inputs)


@torch.library.impl(_library, "sparse_neurons", "CUDA")
def _cuda(*inputs: Any) -> Tensor:
    from graphopt.codegen.triton import sparse_linear as kernel

    return _neurons(kernel, *inputs)


@torch.library.register_fake("graphopt::sparse_neurons", lib=_library)
def _(
    input: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, threshold: Tensor
) -> Tensor:
    return gate.new_empty(gate.shape)


class _SparseUp(torch.autograd.Function):
    """The operator with its derivatives."""

    @staticmethod
    def forward(*inputs: Any) -> Tensor:
        result: Tensor = torch.ops.graphopt.sparse_neurons.default(*inputs)
        return result

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, bias, gate, threshold = ctx.saved_tensors
        wanted = ctx.needs_input_grad
        grad = grad.where(kept(gate, threshold), 0)
        found: list[Tensor | None] = [None] * 5
        rows = (grad * gate).reshape(-1, grad.shape[-1])
        if wanted[0]:
            found[0] = (grad * gate) @ weight
        if wanted[1]:
            found[1] = rows.t() @ input.reshape(-1, input.shape[-1])
        if wanted[2]:
            found[2] = rows.sum(0)
        if wanted[3]:
            found[3] = grad * F.linear(input, weight, bias)
        return tuple(found)


def sparse_up(
    input: Tensor, weight: Tensor, bias: Tensor | None, gate: Tensor, threshold: Tensor
) -> Tensor:
    """Return [..., N]; arguments as in the module."""
    inputs = (input, weight, bias, gate, threshold)
    if needs_gradient(inputs):
        result: Tensor = _SparseUp.apply(*inputs)
        return result
    return _SparseUp.forward(*inputs)


# Decomposed where it is traced, for `sparse_linear`'s reasons.
torch.library.impl(_library, "sparse_up", "CompositeImplicitAutograd")(sparse_up)
