"""``graphopt::hold_neurons``: where a graph has the neurons that a cache keeps.

It stands in every layer that keeps some, before its attention, and holds what
`graphopt.runtime.neurons.NeuronBuffers` has. `neuron-mask` takes it out and counts, or
computes with the buffers; without that pass it forgets what was chosen, so that nothing
is ever computed with another text's neurons.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_library = torch.library.Library("graphopt", "FRAGMENT")
_library.define(
    "hold_neurons(Tensor counts, Tensor(a!) indices, Tensor up, Tensor down, "
    "Tensor? gate, Tensor? up_bias, Tensor? gate_bias, Tensor? shares, str phase, "
    "int weight=1, Tensor? up_scales=None, Tensor? down_scales=None, "
    "Tensor? gate_scales=None) -> ()"
)
_library.define("check_neurons(Tensor(a!) indices, Tensor[] others) -> ()")

# A new text is counted, more of it, or a token that runs densely to be counted;
# or the call computes with the neurons that were chosen.
PHASES = ("new", "more", "refresh", "use")


def hold_neurons(
    counts: Tensor,
    indices: Tensor,
    up: Tensor,
    down: Tensor,
    gate: Tensor | None,
    up_bias: Tensor | None,
    gate_bias: Tensor | None,
    shares: Tensor | None,
    phase: str,
    weight: int = 1,
    up_scales: Tensor | None = None,
    down_scales: Tensor | None = None,
    gate_scales: Tensor | None = None,
) -> None:
    """Note that this call computes densely and counts nothing.

    Whatever was chosen is then of a text that has gone on since. Scales are of
    the weights' outputs, where these are int8 codes.
    """
    if phase != "use":
        indices.fill_(-1)


def check_neurons(indices: Tensor, others: Sequence[Tensor]) -> None:
    """Raise RuntimeError unless neurons were chosen, in every layer that keeps some.

    ``others``: the indices of the layers behind the first. Nothing waits for a GPU.
    """
    chosen = torch.stack([x[0, 0] for x in (indices, *others)]).amin() >= 0
    message = (
        "graphopt.Cache: no neurons were chosen for this text: run its prompt through "
        "the model compiled with the pass 'neuron-mask', or use a cache without neurons"
    )
    if indices.device.type != "cpu":
        torch._assert_async(chosen, message)
    elif not bool(chosen):
        raise RuntimeError(message)


for _operator in (hold_neurons, check_neurons):
    torch.library.impl(_library, _operator.__name__, "CompositeExplicitAutograd")(
        _operator
    )


@torch.library.register_fake("graphopt::hold_neurons", lib=_library)
@torch.library.register_fake("graphopt::check_neurons", lib=_library)
def _nothing(*inputs: Any) -> None:
    return None
