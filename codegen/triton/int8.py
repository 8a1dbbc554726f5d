"""Int8 linears on Triton: emit the kernels of a spec, import them, launch them.

The shadow of a call is made of lists of channels, one for each `LIST_ROWS` rows, as
long as they need be. A static capacity would need a float product beside it for calls
that exceed it, and the host, which waits for the device, to choose; a loop over the
list's own count is exact for any number, the same each time, and a CUDA graph of it
holds for every input. Lists of few rows keep it short where outliers are spread over
many channels, a few in each row.
"""

from __future__ import annotations

from functools import cache
from threading import Thread
from types import ModuleType

import torch
from torch import Tensor

from graphopt.codegen.cache import load_python
from graphopt.codegen.targets import present
from graphopt.codegen.triton.attention import require_runnable
from graphopt.codegen.triton.int8_emit import emit_product, emit_rows
from graphopt.codegen.triton.int8_spec import MOST_ROWS, ProductSpec, RowsSpec
from graphopt.codegen.triton.int8_tune import choose_tile
from graphopt.codegen.triton.interpreter import (
    is_interpreted,
    repair_bfloat16_cast,
    repair_bfloat16_dot,
)
from graphopt.codegen.triton.spec import DTYPES

# Programs that keep a large GPU's memory busy; fewer outputs than that are split.
_PROGRAMS = 256


@cache
def load(spec: ProductSpec | RowsSpec) -> ModuleType:
    """Write the kernels' file to the cache directory and import it."""
    if is_interpreted():
        repair_bfloat16_dot()
        repair_bfloat16_cast()
    return load_python(spec.name, source_of(spec))


def source_of(spec: ProductSpec | RowsSpec) -> str:
    """Return the text of the kernels."""
    return emit_product(spec) if isinstance(spec, ProductSpec) else emit_rows(spec)


def supports(input: Tensor, weight: Tensor) -> bool:
    """Tell whether there are kernels for activations and a weight like these."""
    return input.dtype in DTYPES and weight.dtype == input.dtype


def shadow_product(
    input: Tensor,
    codes: Tensor,
    settings: Tensor,
    weight_codes: Tensor,
    scales: Tensor,
    weight: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """Return [..., N] in the input's dtype: int8 products, and the shadow in float.

    input [..., K] of bfloat16, float16 or float32; codes uint8 [..., K], 128 for zero;
    settings float32 [2], the scale and whether there is a shadow (1.0), which is read
    on the device; weight_codes int8 [N, K], scales float32 [N] of its rows, weight
    [N, K] of the input's dtype and any strides, bias [N] of any float dtype. For each
    value x beyond -128 .. 127 scales, x less the nearest of those ends is multiplied
    with the float weight (Xu et al. 2025, llm.npu, section 3.3), for any number of
    them. Sums are int32 and float32. Three launches (one without a shadow), whose grids
    depend on shapes alone. Raises KernelError for a dtype or device without kernel.
    """
    # The host does not ask the device, which may or may not have one.
    has_shadow = settings.is_cuda or bool(settings[1])
    spec = ProductSpec(input.dtype, has_shadow, has_bias=bias is not None)
    given = on_device(settings, input.device)
    rows = input.reshape(-1, input.shape[-1])
    floats = [rows if rows.stride(-1) == 1 else rows.contiguous(), weight]
    made = (codes, given, weight_codes, scales)
    return _product(spec, input, made, floats if has_shadow else [], bias)


def token_product(
    input: Tensor,
    codes: Tensor,
    token_scales: Tensor,
    weight_codes: Tensor,
    scales: Tensor,
    bias: Tensor | None,
) -> Tensor:
    """Return [..., N] of codes with a scale for each row, float32 [..., 1].

    Other operands as for `shadow_product`; there is no shadow, and one launch. Of
    ``input`` the dtype counts.
    """
    spec = ProductSpec(input.dtype, by_token=True, has_bias=bias is not None)
    made = (codes, token_scales.contiguous(), weight_codes, scales)
    return _product(spec, input, made, [], bias)


def _product(
    spec: ProductSpec,
    input: Tensor,
    made: tuple[Tensor, Tensor, Tensor, Tensor],
    floats: list[Tensor],
    bias: Tensor | None,
) -> Tensor:
    codes, settings, weight_codes, scales = made
    require_runnable(codes)
    outputs, width = weight_codes.shape
    out = input.new_empty((*codes.shape[:-1], outputs))
    if out.numel() == 0:
        return out
    rows = codes.reshape(-1, width).contiguous()
    arguments = [rows, weight_codes, scales, settings, *floats]
    arguments += [] if bias is None else [bias.contiguous()]
    arguments.append(out)
    candidates = spec.tiles(present(codes.device), rows.shape[0])
    kernel = load(spec).launch
    with torch.cuda.device_of(codes):
        tile = choose_tile(
            source_of(spec), candidates, kernel, arguments, rows, outputs
        )
        kernel(*arguments, tile.block_m, tile.block_n, **tile.options())
    return out


def weight_only(
    input: Tensor, codes: Tensor, bias: Tensor | None, scales: Tensor
) -> Tensor:
    """Return input @ (codes * scales)^T + bias, [..., N] in the input's dtype.

    input [..., K] of at most `MOST_ROWS` rows in bfloat16, float16 or float32, codes
    int8 [N, K] in one piece, scales float32 [N], bias [N] of any float dtype. Products
    are exact and sums float32, the same each time. One launch, or two where there are
    few outputs. Raises KernelError for a dtype or device without kernel.
    """
    require_runnable(input)
    outputs, width = codes.shape
    out = input.new_empty((*input.shape[:-1], outputs))
    if out.numel() == 0:
        return out
    spec = RowsSpec(input.dtype, input.numel() // width, bias is not None)
    operands = [input.contiguous(), codes, scales]
    operands += [] if bias is None else [bias.contiguous()]
    arguments = [*operands, out, _PROGRAMS]
    kernel = load(spec).launch
    with torch.cuda.device_of(input):
        tile = choose_tile(
            source_of(spec), spec.tiles(), kernel, arguments, input, outputs
        )
        kernel(*arguments, tile.block_m, tile.block_n, **tile.options())
    return out


def on_device(settings: Tensor, device: torch.device) -> Tensor:
    """Return ``settings`` on ``device``; a copy of what lies on the CPU is kept."""
    if settings.device == device:
        return settings
    return held(tuple(settings.tolist()), device)


@cache
def held(values: tuple[float, ...], device: torch.device) -> Tensor:
    """Return ``values`` as float32 that lives as long as the process.

    Made on a thread of its own, as `graphopt.codegen.triton.attention.on_device`.
    """
    made: list[Tensor] = []

    def make() -> None:
        made.append(torch.tensor(values, dtype=torch.float32, device=device))

    thread = Thread(target=make)
    thread.start()
    thread.join()
    return made[0]


__all__ = [
    "MOST_ROWS",
    "held",
    "shadow_product",
    "supports",
    "token_product",
    "weight_only",
]
