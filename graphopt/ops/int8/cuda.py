"""Int8 linears on a GPU: Triton kernels where there are any, else plain products.

``graphopt::shadow_linear`` and ``graphopt::int8_linear`` as in
`graphopt.ops.int8.linear`, but that the float weight stays on the device, ``capacity``
and ``room`` mean nothing and ``on_file`` must be False: the shadow of any number of
outliers is computed as it is (`graphopt.codegen.triton.int8`), so that no call is made
in float instead, none is counted, and CUDA graphs hold for every input. A weight has
one set of codes for these operators and for the weight-only one.

``graphopt::weight_only_rows(input, codes, bias, scales)`` is what
``graphopt::weight_only_linear`` can be over up to 16 rows on a GPU: input [..., K],
codes int8 [N, K], bias [N] or None, scales float32 [N]; result [..., N] = input @
(codes * scales)^T + bias in the dtype of ``input``, sums in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from threading import Thread
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.codegen.triton.int8_spec import MOST_ROWS
from graphopt.codegen.triton.spec import DTYPES
from graphopt.errors import KernelError
from graphopt.ops.int8.codes import LEAST, MOST, ZERO, coded
from graphopt.ops.int8.prepare import coded_weight, prepared, prepared_transposed

_library = torch.library.Library("graphopt", "FRAGMENT")
_library.define(
    "weight_only_rows(Tensor input, Tensor codes, Tensor? bias, Tensor scales) "
    "-> Tensor"
)


def shadow_reference(
    input: Tensor,
    codes: Tensor,
    settings: Tensor,
    weight_codes: Tensor,
    scales: Tensor,
    weight: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """Compute it in float64 by plain products, on any device, without waiting for it.

    Operands as for `graphopt.codegen.triton.int8.shadow_product`.
    """
    scale = settings[0].double()
    inner = (codes.double() - ZERO) * scale
    result = F.linear(inner, weight_codes.double() * scales.double()[:, None])
    wide = input.double()
    beyond = wide - wide.clamp(LEAST * scale, MOST * scale)
    result = result + F.linear(beyond.where(settings[1] != 0, 0), weight.double())
    result = result if bias is None else result + bias.double()
    return result.to(input.dtype)


def token_reference(
    input: Tensor,
    codes: Tensor,
    token_scales: Tensor,
    weight_codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """Compute it in float64; as `graphopt.codegen.triton.int8.token_product`."""
    inner = (codes.double() - ZERO) * token_scales.double()
    result = F.linear(inner, weight_codes.double() * scales.double()[:, None])
    result = result if bias is None else result + bias.double()
    return result.to(input.dtype)


def rows_reference(
    input: Tensor, codes: Tensor, bias: Tensor | None, scales: Tensor
) -> Tensor:
    """Compute it in float64; as `graphopt.codegen.triton.int8.weight_only`."""
    weight = codes.double() * scales.double()[:, None]
    wide = None if bias is None else bias.double()
    return F.linear(input.double(), weight, wide).to(input.dtype)


def codes_of(weight: Tensor, transposed: bool, on_file: bool) -> tuple[Tensor, Tensor]:
    """Return the codes int8 [N, K] of ``weight`` and the scales float32 [N].

    They are made on a thread of its own, since CUDA graphs redirect the allocations of
    the thread that records or warms up. Raises KernelError with ``on_file``.
    """
    if on_file:
        raise KernelError(
            "float weights of a GPU cannot lie on a file, since the shadow reads their "
            "columns on the device: give weights = 'memory'"
        )
    if (prepared_transposed if transposed else prepared).known(weight) is None:
        thread = Thread(target=_make, args=(weight, transposed))
        thread.start()
        thread.join()
    return coded_weight(weight, transposed, False)


def _make(weight: Tensor, transposed: bool) -> None:
    """The thread has a stream of its own: others have written, or will read."""
    wait = partial(torch.cuda.synchronize, weight.device) if weight.is_cuda else int
    wait()
    coded_weight(weight, transposed, False)
    wait()


@torch.library.impl(_library, "coded_weights", "CUDA")
def coded_weights(
    weights: Sequence[Tensor], transposed: Sequence[bool], on_file: bool
) -> list[Tensor]:
    """Return the codes and the scales of every weight, one behind the other."""
    pairs = zip(weights, transposed, strict=True)
    return [part for pair in pairs for part in codes_of(*pair, on_file)]


@torch.library.impl(_library, "shadow_linear", "CUDA")
def shadow_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    codes: Tensor,
    settings: Tensor,
    capacity: float,
    room: int,
    transposed: bool,
    on_file: bool,
) -> Tensor:
    """Multiply int8 codes, and in float what lies beyond their range (the shadow)."""
    from graphopt.codegen.triton import int8 as kernel

    made = codes_of(weight, transposed, on_file)
    plain = weight.t() if transposed else weight
    operands = (input, codes, settings, *made, plain, bias)
    if kernel.supports(input, weight):
        return kernel.shadow_product(*operands)
    return shadow_reference(*operands)


@torch.library.impl(_library, "int8_linear", "CUDA")
def int8_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    transposed: bool,
    on_file: bool,
) -> Tensor:
    """Multiply by int8 codes with one scale a token, found at run time."""
    from graphopt.codegen.triton import int8 as kernel

    made = codes_of(weight, transposed, on_file)
    wide = input.float()
    scales = (wide.abs().amax(-1, keepdim=True) / MOST).clamp_min(1e-30)
    operands = (input, coded(wide / scales), scales, *made, bias)
    if kernel.supports(input, weight):
        return kernel.token_product(*operands)
    return token_reference(*operands)


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
