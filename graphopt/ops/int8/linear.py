"""``graphopt::shadow_linear`` and its baselines: linears whose weights are int8 codes.

input [..., K], weight [N, K] ([K, N] where ``transposed``), bias [N] or None; result
[..., N] in the input's dtype. CPU, float32 sums. The weight is turned into codes at its
first use, one scale a row; with ``on_file`` the float weight itself then moves to a
file, from which it is still read where float is asked for, so that memory holds the
codes alone. Derivatives are those of the float linear (straight-through).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from graphopt.ops import linear_gradients
from graphopt.ops.int8.codes import LEAST, MOST, ZERO, coded_by_token
from graphopt.ops.int8.prepare import packed_weight
from graphopt.ops.int8.weights import Int8Weight

_Made = tuple[Int8Weight, Tensor]

_library = torch.library.Library("graphopt", "FRAGMENT")
_library.define(
    "shadow_linear(Tensor input, Tensor weight, Tensor? bias, Tensor codes, "
    "Tensor settings, float capacity, int room, bool transposed, bool on_file) "
    "-> Tensor"
)
_library.define(
    "int8_linear(Tensor input, Tensor weight, Tensor? bias, bool transposed, "
    "bool on_file) -> Tensor"
)


def _product(codes: Tensor, scale: float, made: _Made, bias: Tensor | None) -> Any:
    held, packed = made
    wide = None if bias is None else bias.float()
    sizes = (scale, ZERO, packed, held.scales, held.zeros, wide)
    return torch.ops.onednn.qlinear_pointwise(
        codes, *sizes, 1.0, 0, torch.float32, "none", [], ""
    )


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
    """Multiply int8 codes, and in float what lies beyond their range (the shadow).

    ``codes`` and ``settings`` as in `graphopt.ops.int8.codes`. The few values beyond
    are multiplied with the float columns of their channels (Xu et al. 2025, llm.npu,
    section 3.3); ``room`` columns of a weight stay in memory. Where more than the share
    ``capacity`` of the input lies beyond, the whole product is made in float.
    """
    scale, has_shadow = settings.tolist()
    made = packed_weight(weight, transposed, on_file)
    held, result = made[0], _product(codes, scale, made, bias)
    if has_shadow:
        plain = weight.t() if transposed else weight
        rows = input.reshape(-1, input.shape[-1])
        rows = rows if rows.stride(-1) == 1 else rows.contiguous()
        limit, ends = int(capacity * rows.numel()), (LEAST * scale, MOST * scale)
        columns = held.columns_of(plain, room, on_file)
        if columns.add(rows, ends, limit, result.view(rows.shape[0], -1)) > limit:
            held.count_overflow()
            return F.linear(input, plain, bias)
    return result.to(input.dtype)


def int8_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    transposed: bool,
    on_file: bool,
) -> Tensor:
    """Multiply by int8 codes with one scale a token, found at run time."""
    made = packed_weight(weight, transposed, on_file)
    codes, scales = coded_by_token(input)
    result: Tensor = _product(codes, 1.0, made, None) * scales
    result = result if bias is None else result + bias
    return result.to(input.dtype)


torch.library.impl(_library, "shadow_linear", "CPU")(shadow_linear)
torch.library.impl(_library, "int8_linear", "CPU")(int8_linear)


@torch.library.register_fake("graphopt::shadow_linear", lib=_library)
def _(
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
    return input.new_empty(*input.shape[:-1], weight.shape[1 if transposed else 0])


@torch.library.register_fake("graphopt::int8_linear", lib=_library)
def _(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    transposed: bool,
    on_file: bool,
) -> Tensor:
    return input.new_empty(*input.shape[:-1], weight.shape[1 if transposed else 0])


linear_gradients.register("graphopt::shadow_linear", _library, transposed=7)
linear_gradients.register("graphopt::int8_linear", _library, transposed=3)
