"""``graphopt::onednn_linear``: a linear over weights that oneDNN has laid out for it.

input [..., K], weight [N, K] ([K, N] where ``transposed``), bias [N] or None; result
[..., N]. CPU. oneDNN reads weights in blocks that fit its registers; rearranged once
and kept, they are read so by every call, over any number of rows. Other BLAS rearrange
a weight within each call, which costs the more the fewer the rows. The rearranged
weight is as large as the weight, and made anew when the weight changes.
"""

from __future__ import annotations

import torch
from torch import Tensor

from graphopt.ops import linear_gradients
from graphopt.ops.prepared import Prepared

_library = torch.library.Library("graphopt", "FRAGMENT")
_library.define(
    "onednn_linear(Tensor input, Tensor weight, Tensor? bias=None, "
    "bool transposed=False) -> Tensor"
)
# Every layout that oneDNN gave for 1 to 2,048 rows served the others as well.
_ROWS = 256


def available() -> bool:
    """Tell whether torch was built with oneDNN."""
    return bool(torch.backends.mkldnn.is_available())


def _laid_out(weight: Tensor) -> Tensor:
    laid: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight.contiguous(), _ROWS)
    return laid


prepared = Prepared(_laid_out)
prepared_transposed = Prepared(lambda weight: _laid_out(weight.t()))


def onednn_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    transposed: bool = False,
) -> Tensor:
    """Return input @ weight^T + bias, [..., N]; see the module."""
    laid = (prepared_transposed if transposed else prepared)(weight)
    result: Tensor = torch.ops.mkldnn._linear_pointwise(
        input, laid, bias, "none", [], ""
    )
    return result


torch.library.impl(_library, "onednn_linear", "CPU")(onednn_linear)


@torch.library.register_fake("graphopt::onednn_linear", lib=_library)
def _(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    transposed: bool = False,
) -> Tensor:
    outputs = weight.shape[1 if transposed else 0]
    return input.new_empty(*input.shape[:-1], outputs)


linear_gradients.register("graphopt::onednn_linear", _library, transposed=3)
