"""Choose the tile of an int8 kernel: measured once per sizes, and kept.

As `graphopt.codegen.triton.tune` does for attention, whose store this shares.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from graphopt.codegen.cache import digest
from graphopt.codegen.targets import Tile
from graphopt.codegen.triton.tune import _can_measure, _chosen, _fastest, _stored

# A decoding step asks some hundred times: without reading a text or the device's name.
_known: dict[tuple[object, ...], Tile] = {}


def choose_tile(
    source: str,
    candidates: tuple[Tile, ...],
    kernel: Callable[..., None],
    arguments: Sequence[object],
    input: Tensor,
    outputs: int,
) -> Tile:
    """Return the fastest of ``candidates`` for these arguments, or the first.

    Numbers of rows share a choice within a factor of two; ``source`` is the kernel's.
    """
    width = input.shape[-1]
    sizes = ((input.numel() // width).bit_length(), width, outputs)
    key = (source, candidates, input.device, sizes)
    if key not in _known:
        if len(candidates) == 1 or not _can_measure(input):
            return candidates[0]
        name = torch.cuda.get_device_name(input.device)
        identity = (source, name, sizes, [str(tile) for tile in candidates])
        label = digest(repr(identity).encode())[:32]
        if label not in _chosen:
            _chosen[label] = _stored(label, candidates) or _fastest(
                label, kernel, arguments, candidates
            )
        _known[key] = _chosen[label]
    return _known[key]
