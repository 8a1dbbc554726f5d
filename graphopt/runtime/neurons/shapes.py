"""The feed-forward networks of a transformers model, by the shapes of their weights."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from graphopt._compat import local_part
from graphopt.errors import ConfigError


@dataclass(frozen=True)
class FfnShape:
    """One FFN: ``hidden_size`` channels through ``neurons`` and back.

    ``own``: how many of the neurons this process holds, where ranks share them out;
    ``fused``: gate and up are one projection; ``transposed``: weights lie as [inputs,
    outputs] (Conv1D).
    """

    hidden_size: int
    neurons: int
    gated: bool
    fused: bool
    up_bias: bool
    gate_bias: bool
    transposed: bool
    dtype: torch.dtype
    device: torch.device
    own: int


@dataclass(frozen=True)
class _Matrix:
    parent: str
    inputs: int
    outputs: int
    transposed: bool
    bias: bool
    weight: torch.Tensor


def find_ffn_shapes(model: Any) -> list[FfnShape | None]:
    """Return the FFN of each decoder layer; None where it is none (experts).

    The last product of a layer is the down projection, where it gives the hidden size;
    what stands beside it and gives its inputs is up and gate. Raises ConfigError for a
    model without a stack of layers.
    """
    config = model.config.get_text_config()
    layers, hidden = _stack(model, config.num_hidden_layers), config.hidden_size
    return [_shape(list(_matrices(layer)), hidden) for layer in layers]


def _stack(model: Any, count: int) -> nn.ModuleList:
    decoder = model.get_decoder() if hasattr(model, "get_decoder") else model
    for root in (decoder, model):
        for module in root.modules():
            if isinstance(module, nn.ModuleList) and len(module) == count:
                return module
    raise ConfigError(
        f"{type(model).__name__}: no list of its {count} layers was found, so the "
        "neurons of its feed-forward networks are not known"
    )


def _matrices(layer: nn.Module) -> Iterator[_Matrix]:
    for name, module in layer.named_modules():
        weight = getattr(module, "weight", None)
        if isinstance(module, nn.Embedding) or not isinstance(weight, torch.Tensor):
            continue
        if weight.ndim == 2:
            transposed = type(module).__name__ == "Conv1D"
            outputs, inputs = weight.shape[::-1] if transposed else weight.shape
            bias = getattr(module, "bias", None) is not None
            parent = name.rpartition(".")[0]
            yield _Matrix(parent, inputs, outputs, transposed, bias, weight)


def _shape(matrices: list[_Matrix], hidden: int) -> FfnShape | None:
    if not matrices or matrices[-1].outputs != hidden:
        return None
    down = matrices.pop()
    beside = [m for m in matrices if m.parent == down.parent]
    return _through([m for m in beside if m.inputs == hidden], down, hidden)


def _through(found: list[_Matrix], down: _Matrix, hidden: int) -> FfnShape | None:
    alone = [m for m in found if m.outputs == down.inputs][-2:]
    double = [m for m in found if m.outputs == 2 * down.inputs]
    ups = alone or double[-1:]
    if not ups or len({(m.transposed, m.weight.dtype) for m in (*ups, down)}) > 1:
        return None
    return FfnShape(
        hidden,
        down.inputs,
        gated=len(alone) == 2,
        fused=not alone,
        up_bias=ups[-1].bias,
        gate_bias=len(alone) == 2 and alone[0].bias,
        transposed=down.transposed,
        dtype=down.weight.dtype,
        device=down.weight.device,
        own=int(local_part(down.weight).shape[0 if down.transposed else 1]),
    )
