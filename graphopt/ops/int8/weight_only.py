"""``graphopt::weight_only_linear``: int8 weights, and activations as they are.

A decoding step multiplies one row (one a prompt) with every weight, so its time is that
of reading them, and codes are a quarter of float32's bytes. Activations in codes would
save nothing there and cost accuracy.

``graphopt::coded_weights`` gives the codes int8 [N, K] and the scales float32 [N] of
each of ``weights`` (``transposed``: it lies as [K, N]), all of a graph's in one call,
as a call for each would take as long as a product. They are the ones that are kept, not
copies: nothing may write to them (`graphopt._compat.keep_outputs`).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from weakref import ref

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

from graphopt.ops.int8.cuda import codes_of
from graphopt.ops.int8.cuda_rows import serves_rows
from graphopt.ops.int8.prepare import coded_weight
from graphopt.ops.prepared import state_of

# Rows up to which one loop over the codes is faster than a product of floats.
FEW_ROWS = 8

_library = torch.library.Library("graphopt", "FRAGMENT")
_library.define(
    "coded_weights(Tensor[] weights, bool[] transposed, bool on_file) -> Tensor[]"
)
_library.define(
    "weight_only_linear(Tensor input, Tensor codes, Tensor? bias, Tensor scales) "
    "-> Tensor"
)


def coded_weights(
    weights: Sequence[Tensor], transposed: Sequence[bool], on_file: bool
) -> list[Tensor]:
    """Return the codes and the scales of every weight, one behind the other."""
    call, first = (tuple(transposed), on_file), weights[0]
    kept = _calls.get(first, {}).get(call)
    if kept is not None and kept.holds(weights):
        return list(kept.results)
    found: list[Tensor] = []
    for weight, is_transposed in zip(weights, transposed, strict=True):
        make = codes_of if weight.is_cuda else coded_weight
        found += make(weight, is_transposed, on_file)
    _calls.setdefault(first, {})[call] = _Call(weights, found)
    return found


class _Call:
    """What a call returned, as long as its weights are the same and not written to.

    A step makes the same call again, and to look up weight by weight what is kept takes
    a tenth of its time.
    """

    def __init__(self, weights: Sequence[Tensor], results: list[Tensor]) -> None:
        self._weights = [ref(weight) for weight in weights]
        self._states = [state_of(weight) for weight in weights]
        self.results = results

    def holds(self, weights: Sequence[Tensor]) -> bool:
        """Tell whether ``weights`` are those of this call, as they were then."""
        if len(weights) != len(self._weights):
            return False
        known = zip(weights, self._weights, self._states, strict=True)
        return all(w is r() and state_of(w) == state for w, r, state in known)


_calls: Any = WeakTensorKeyDictionary()


torch.library.impl(_library, "coded_weights", "CompositeExplicitAutograd")(
    coded_weights
)


@torch.library.register_fake("graphopt::coded_weights", lib=_library)
def _(
    weights: Sequence[Tensor], transposed: Sequence[bool], on_file: bool
) -> list[Tensor]:
    found = []
    for weight, is_transposed in zip(weights, transposed, strict=True):
        sizes = weight.shape[::-1] if is_transposed else weight.shape
        found.append(weight.new_empty(sizes, dtype=torch.int8))
        found.append(weight.new_empty(sizes[:1], dtype=torch.float32))
    return found


def weight_only_linear(
    input: Tensor, codes: Tensor, bias: Tensor | None, scales: Tensor
) -> Tensor:
    """Return input @ (codes * scales)^T + bias, [..., N] in the dtype of ``input``.

    input [..., K], codes [N, K], scales [N], bias [N]. Over few rows it is built of dot
    products that Inductor makes one loop of, with sums in float32 at least, as
    `graphopt.ops.skinny_linear`; over more the weights are made float for the call.
    """
    if serves_rows(input):  # on a GPU
        found: Tensor = torch.ops.graphopt.weight_only_rows(input, codes, bias, scales)
        return found
    wide = torch.promote_types(input.dtype, torch.float32)
    rows = input.reshape(-1, input.shape[-1])
    if not isinstance(rows.shape[0], int) or rows.shape[0] > FEW_ROWS:
        weight = (codes.to(wide) * scales[:, None]).to(input.dtype)
        return F.linear(input, weight, bias)
    # Inductor would compute what the input is made of again for every row of codes.
    held = rows.to(wide)
    held = held.as_strided(held.shape, held.stride())
    sums = [(codes.to(wide) * row).sum(-1) for row in held.unbind()]
    result = torch.stack(sums) * scales
    if bias is not None:
        result = result + bias.to(wide)
    return result.to(input.dtype).view(*input.shape[:-1], codes.shape[0])


# Decomposed wherever it is traced, so that it fuses and has derivatives.
torch.library.impl(_library, "weight_only_linear", "CompositeImplicitAutograd")(
    weight_only_linear
)
