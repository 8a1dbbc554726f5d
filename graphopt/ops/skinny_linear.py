"""``graphopt::skinny_linear``: a linear over few rows, as dot products with the weight.

input [..., K] with few rows, weight [N, K], bias [N] or None; result [..., N]. Sums are
made in float32 at least, in another order than BLAS's. It is built of plain operators
that a compiler can fuse, one reduction a row over the same weight: Inductor makes one
loop of them, which reads every weight once, as fast as memory gives it. Elsewhere the
products are materialised, so run it compiled.
"""

from __future__ import annotations

import torch
from torch import Tensor

_library = torch.library.Library("graphopt", "FRAGMENT")
_library.define(
    "skinny_linear(Tensor input, Tensor weight, Tensor? bias=None) -> Tensor"
)


def skinny_linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return input @ weight^T + bias, [..., N] in the dtype of ``input``."""
    wide = torch.promote_types(input.dtype, torch.float32)
    rows = input.reshape(-1, input.shape[-1]).to(wide).unbind()
    result = torch.stack([(weight.to(wide) * row).sum(-1) for row in rows])
    if bias is not None:
        result = result + bias.to(wide)
    return result.to(input.dtype).view(*input.shape[:-1], weight.shape[0])


# Decomposed wherever it is traced, so that it has derivatives and fuses.
torch.library.impl(_library, "skinny_linear", "CompositeImplicitAutograd")(
    skinny_linear
)
