"""Int8 linears on a GPU: Triton kernels where there are any, else plain products.

``graphopt::shadow_linear`` and ``graphopt::int8_linear`` as in
`graphopt.ops.int8.linear`, but that the float weight stays on the device, ``capacity``
and ``room`` mean nothing and ``on_file`` must be False: the shadow of any number of
outliers is computed as it is (`graphopt.codegen.triton.int8`), so that no call is made
in float instead, none is counted, and CUDA graphs hold for every input. A weight has
one set of codes for these operators and for `graphopt.ops.int8.cuda_rows`.
"""

from __future__ import annotations

from threading import Thread

import torch
from torch import Tensor

from graphopt.errors import KernelError
from graphopt.ops.int8.codes import coded_by_token
from graphopt.ops.int8.cuda_reference import shadow_reference, token_reference
from graphopt.ops.int8.prepare import coded_weight, prepared, prepared_transposed

_library = torch.library.Library("graphopt", "FRAGMENT")


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
    if weight.is_cuda:
        torch.cuda.synchronize(weight.device)
    coded_weight(weight, transposed, False)
    if weight.is_cuda:
        torch.cuda.synchronize(weight.device)


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
    operands = (input, *coded_by_token(input), *made, bias)
    if kernel.supports(input, weight):
        return kernel.token_product(*operands)
    return token_reference(*operands)
