"""Of the core neurons of a layer, those that this rank has under tensor parallelism.

A rank has ``count`` of the F neurons from ``start`` on; ``indices`` [R, C] are of all.
None of the C may be its own, or all: buffers have ``room`` for min(C, count), and what
lies behind the first ``valid`` int64 [R] is skipped, or adds nothing: the columns of
the down projection are zero there.

- ``own_neurons(indices, start, count, room)``: places int64 [R, room] from ``start``
  on, ascending, 0 behind the last.
- ``count_own(indices, start, count)``: ``valid``.
- ``most_chosen(weight, own, valid, dim)``: the greatest magnitude of the weights of
  ``own`` [R, room] neurons, which lie along ``dim``, for each output, float32 [R, N].
- ``clear_behind(buffer, valid, dim)``: zeros along ``dim`` of [K, N], or of [R, K, N]
  where R > 1, in place.
- ``valid_linear(input, weight, bias, valid, of_inputs, transposed, fused)``: a linear
  that reads ``valid`` inputs or outputs of its weight [N, K] ([K, N] where
  ``transposed``, ``fused`` blocks of outputs one behind the other), R = 1. Outputs that
  it does not compute are zero.
"""

from __future__ import annotations

import torch
from torch import Tensor

_library = torch.library.Library("graphopt", "FRAGMENT")
_library.define("own_neurons(Tensor indices, int start, int count, int room) -> Tensor")
_library.define("count_own(Tensor indices, int start, int count) -> Tensor")
_library.define(
    "most_chosen(Tensor weight, Tensor own, Tensor valid, int dim) -> Tensor"
)
_library.define("clear_behind(Tensor(a!) buffer, Tensor valid, int dim) -> ()")
_library.define(
    "valid_linear(Tensor input, Tensor weight, Tensor? bias, Tensor valid, "
    "bool of_inputs, bool transposed=False, int fused=1) -> Tensor"
)


def own_neurons(indices: Tensor, start: int, count: int, room: int) -> Tensor:
    """Return the places of this rank's; see the module."""
    place = indices - start
    place = place.masked_fill((place < 0) | (place >= count), count)
    first = place.sort(1).values[:, :room]
    return first.masked_fill(first == count, 0)


def count_own(indices: Tensor, start: int, count: int) -> Tensor:
    """Return how many are this rank's; see the module."""
    return ((indices >= start) & (indices < start + count)).sum(1)


def clear_behind(buffer: Tensor, valid: Tensor, dim: int) -> None:
    """Clear what no neuron of this rank fills; see the module."""
    rows = buffer.unsqueeze(0) if buffer.ndim == 2 else buffer
    rows.masked_fill_(_behind(rows, valid, dim), 0)


def most_chosen(weight: Tensor, own: Tensor, valid: Tensor, dim: int) -> Tensor:
    """Return the range of what scales are of; see the module."""
    found = weight.index_select(dim, own.flatten()).unflatten(dim, own.shape)
    rows = found.movedim(dim, 0)
    chosen = rows.abs().masked_fill(_behind(rows, valid, dim), 0)
    return chosen.amax(dim + 1).float()


def _behind(rows: Tensor, valid: Tensor, dim: int) -> Tensor:
    """Return what lies behind the first ``valid`` along ``dim`` of each row's matrix.

    rows [R, K, N]; the result has the size 1 along the other axis.
    """
    place = torch.arange(rows.shape[dim + 1], device=rows.device)
    behind = place >= valid[:, None]
    return behind[:, :, None] if dim == 0 else behind[:, None]


def valid_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    valid: Tensor,
    of_inputs: bool,
    transposed: bool = False,
    fused: int = 1,
) -> Tensor:
    """Multiply what is valid; see the module. Waits for ``valid``: for CPUs."""
    number = int(valid)
    matrix = weight.t() if transposed else weight
    linear = torch.nn.functional.linear
    if of_inputs:
        return linear(input[..., :number], matrix[:, :number], bias)
    outputs = matrix.shape[0]
    result = input.new_zeros((*input.shape[:-1], outputs))
    for start in range(0, outputs, outputs // fused):
        rows = slice(start, start + number)
        part = None if bias is None else bias[rows]
        result[..., rows] = linear(input, matrix[rows], part)
    return result


# Decomposed wherever they are traced: a few loops over small tensors, which fuse.
for _operator in (own_neurons, count_own, most_chosen, clear_behind):
    torch.library.impl(_library, _operator.__name__, "CompositeImplicitAutograd")(
        _operator
    )
torch.library.impl(_library, "valid_linear", "CompositeExplicitAutograd")(valid_linear)


@torch.library.register_fake("graphopt::valid_linear", lib=_library)
def _valid_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    valid: Tensor,
    of_inputs: bool,
    transposed: bool = False,
    fused: int = 1,
) -> Tensor:
    outputs = weight.shape[1 if transposed else 0]
    return input.new_empty((*input.shape[:-1], outputs))
