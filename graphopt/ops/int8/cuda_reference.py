"""What int8 linears compute, in float64 by plain products, on any device.

The oracle of their kernels, and what serves types that have no kernel. Operands as in
`graphopt.codegen.triton.int8`; nothing waits for the device.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from graphopt.ops.int8.codes import LEAST, MOST, ZERO


def shadow_reference(
    input: Tensor,
    codes: Tensor,
    settings: Tensor,
    weight_codes: Tensor,
    scales: Tensor,
    weight: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """Return what ``shadow_product`` does, [..., N]."""
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
    """Return what ``token_product`` does, [..., N]."""
    inner = (codes.double() - ZERO) * token_scales.double()
    result = F.linear(inner, weight_codes.double() * scales.double()[:, None])
    result = result if bias is None else result + bias.double()
    return result.to(input.dtype)


def rows_reference(
    input: Tensor, codes: Tensor, bias: Tensor | None, scales: Tensor
) -> Tensor:
    """Return what ``weight_only`` does, [..., N]."""
    weight = codes.double() * scales.double()[:, None]
    wide = None if bias is None else bias.double()
    return F.linear(input.double(), weight, wide).to(input.dtype)
