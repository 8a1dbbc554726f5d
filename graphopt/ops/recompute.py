"""Backward passes by recomputing through the reference of an operator.

Exact, and as hungry for memory as eager attention: training is not what graphopt is
for, but a model that is compiled with gradients enabled must still work.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

_DIFFERENTIABLE = 3  # query, key and value come first


def register_backward(
    library: torch.library.Library,
    name: str,
    schema: str,
    reference: Callable[..., Tensor],
) -> None:
    """Give ``graphopt::name`` the gradients of ``reference`` in its first three inputs.

    ``schema`` lists the operator's arguments without defaults; ``reference`` takes
    them all. The backward is an operator of its own: AOTAutograd traces around it, and
    torch.autograd.grad could not run while it traces.
    """
    backward = f"{name}_backward"
    library.define(f"{backward}(Tensor grad, {schema}) -> (Tensor, Tensor, Tensor)")

    def kernel(grad: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
        wanted = [t.detach().requires_grad_() for t in inputs[:_DIFFERENTIABLE]]
        with torch.enable_grad():
            out = reference(*wanted, *inputs[_DIFFERENTIABLE:])
            grads = torch.autograd.grad(out, wanted, grad)
        return tuple(g.contiguous() for g in grads)

    def fake(grad: Tensor, *inputs: Any) -> tuple[Tensor, ...]:
        return tuple(t.new_empty(t.shape) for t in inputs[:_DIFFERENTIABLE])

    for device in ("CPU", "CUDA"):
        library.impl(backward, kernel, device)
    torch.library.register_fake(f"graphopt::{backward}", fake, lib=library)
    torch.library.register_autograd(
        f"graphopt::{name}", _call(backward), setup_context=_save, lib=library
    )


def _save(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.is_tensor = [isinstance(value, Tensor) for value in inputs]
    ctx.save_for_backward(*(v for v in inputs if isinstance(v, Tensor)))
    ctx.others = [v for v in inputs if not isinstance(v, Tensor)]


def _call(backward: str) -> Callable[..., tuple[Any, ...]]:
    def run(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        saved, others = iter(ctx.saved_tensors), iter(ctx.others)
        inputs = [next(saved) if tensor else next(others) for tensor in ctx.is_tensor]
        grads = getattr(torch.ops.graphopt, backward)(grad, *inputs)
        return (*grads, *[None] * (len(inputs) - _DIFFERENTIABLE))

    return run
