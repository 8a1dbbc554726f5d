"""``graphopt::quantize``: activations as 8-bit codes of one static scale.

A code is the number of steps plus `ZERO`, as uint8: oneDNN multiplies unsigned
activations with signed weights as fast as the processor can (VNNI), and signed ones by
a loop that is thousands of times slower (seen with torch 2.13).

``settings`` float32 [2] are the scale and whether what lies beyond the codes' range is
computed in float (1.0) or lost (0.0). They come from ``graphopt::constants``, so that
layers that differ in nothing else are the same code.
"""

from __future__ import annotations

import torch
from torch import Tensor

LEAST, MOST, ZERO = -128, 127, 128  # in steps; the code that stands for zero

_library = torch.library.Library("graphopt", "FRAGMENT")
_library.define("constants(float[] values, int width, Device? device=None) -> Tensor")
_library.define("quantize(Tensor input, Tensor settings) -> Tensor")


def constants(
    values: list[float], width: int, device: torch.device | None = None
) -> Tensor:
    """Return ``values`` as float32 [len(values) / width, width], on the CPU or a GPU.

    Those on a GPU are copied there once, since a CUDA graph cannot do so.
    """
    if device is not None and device.type == "cuda":
        from graphopt.codegen.triton.int8 import held

        return held(tuple(values), device).view(-1, width).clone()
    return torch.tensor(values, dtype=torch.float32).view(-1, width)


torch.library.impl(_library, "constants", "CompositeExplicitAutograd")(constants)


@torch.library.register_fake("graphopt::constants", lib=_library)
def _(values: list[float], width: int, device: torch.device | None = None) -> Tensor:
    sizes = (len(values) // width, width)
    return torch.empty(sizes, dtype=torch.float32, device=device)


def quantize(input: Tensor, settings: Tensor) -> Tensor:
    """Return round(input / scale) + `ZERO`, clipped, as uint8 [..., K].

    Half to even, as hardware rounds.
    """
    return coded(input.float() / settings[0])


def coded_by_token(input: Tensor) -> tuple[Tensor, Tensor]:
    """Return codes uint8 [..., K] of a scale a token, and the scales [..., 1]."""
    wide = input.float()
    scales = (wide.abs().amax(-1, keepdim=True) / MOST).clamp_min(1e-30)
    return coded(wide / scales), scales


def coded(steps: Tensor) -> Tensor:
    """Return the codes of numbers of steps, rounded and clipped."""
    return (steps.round().clamp(LEAST, MOST) + ZERO).to(torch.uint8)


# Decomposed wherever it is traced, so that it fuses with what made the activations.
torch.library.impl(_library, "quantize", "CompositeImplicitAutograd")(quantize)
