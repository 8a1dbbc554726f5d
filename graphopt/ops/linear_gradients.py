"""Derivatives of operators that stand for a linear: those of the linear itself."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def register(name: str, library: torch.library.Library, *, transposed: int) -> None:
    """Give operator ``name`` the derivatives of input @ weight^T + bias.

    Its first three arguments are input [..., K], weight [N, K] and bias [N] or None;
    argument number ``transposed`` tells that the weight lies as [K, N]. For an operator
    that rounds (int8), these are straight-through derivatives.
    """

    def save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        input, weight, ctx.bias = inputs[:3]
        ctx.transposed, ctx.arguments = inputs[transposed], len(inputs)
        ctx.save_for_backward(input, weight)

    torch.library.register_autograd(name, _backward, setup_context=save, lib=library)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    input, weight = ctx.saved_tensors
    wanted = ctx.needs_input_grad
    rows = grad.reshape(-1, grad.shape[-1])
    found: list[Tensor | None] = [None] * ctx.arguments
    if wanted[0]:
        found[0] = grad @ (weight.t() if ctx.transposed else weight)
    if wanted[1]:
        by_output = rows.t() @ input.reshape(-1, input.shape[-1])
        found[1] = by_output.t() if ctx.transposed else by_output
    if ctx.bias is not None and wanted[2]:
        found[2] = rows.sum(0)
    return tuple(found)
