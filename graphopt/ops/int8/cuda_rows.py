"""``graphopt::weight_only_rows``: few float rows times int8 weights, on a GPU.

What ``graphopt::weight_only_linear`` can be there: input [..., K] of up to 16 rows,
codes int8 [N, K], bias [N] or None, scales float32 [N]; result [..., N] = input @
(codes * scales)^T + bias in the dtype of ``input``, sums in float32. Derivatives are
those of a linear of that weight, for the input and the bias.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from graphopt.codegen.triton.int8_spec import MOST_ROWS
from graphopt.codegen.triton.spec import DTYPES
from graphopt.ops.int8.cuda_reference import rows_reference

_library = torch.library.Library("graphopt", "FRAGMENT")
_library.define(
    "weight_only_rows(Tensor input, Tensor codes, Tensor? bias, Tensor scales) "
    "-> Tensor"
)


def serves_rows(input: Tensor) -> bool:
    """Tell whether the kernel over few float rows takes ``input``."""
    width = input.shape[-1]
    few = isinstance(input.numel(), int) and input.numel() <= MOST_ROWS * width
    return input.is_cuda and width > 0 and few and input.dtype in DTYPES


@torch.library.impl(_library, "weight_only_rows", "CUDA")
def weight_only_rows(
    input: Tensor, codes: Tensor, bias: Tensor | None, scales: Tensor
) -> Tensor:
    """Multiply few float rows by int8 weights; what has no kernel, plainly."""
    if not serves_rows(input):
        return rows_reference(input, codes, bias, scales)
    from graphopt.codegen.triton import int8 as kernel

    return kernel.weight_only(input, codes, bias, scales)


torch.library.impl(_library, "weight_only_rows", "CPU")(rows_reference)


@torch.library.register_fake("graphopt::weight_only_rows", lib=_library)
def _(input: Tensor, codes: Tensor, bias: Tensor | None, scales: Tensor) -> Tensor:
    return input.new_empty(*input.shape[:-1], codes.shape[0])


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1], inputs[3])
    ctx.has_bias = inputs[2] is not None


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    codes, scales = ctx.saved_tensors
    weight = (codes.float() * scales[:, None]).to(grad.dtype)
    by_bias = grad.reshape(-1, grad.shape[-1]).sum(0) if ctx.has_bias else None
    return grad @ weight, None, by_bias, None


torch.library.register_autograd(
    "graphopt::weight_only_rows", _backward, setup_context=_setup, lib=_library
)
