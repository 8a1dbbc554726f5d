"""Which weights a rank of a pipeline keeps: those that its stages may read."""

from __future__ import annotations

from collections.abc import Container, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from graphopt._compat import local_part
from graphopt.config import load_config
from graphopt.integrations.pipelining.caches import give_up
from graphopt.learngene.stack import find_stack
from graphopt.memory import forget


def place(
    model: nn.Module,
    stages: Iterable[range],
    device: torch.device | str,
    config: Any,
) -> int:
    """Move ``model`` to ``device``, of its layers those of ``stages`` alone.

    The weights of others are given up before anything is compiled, so that no rank
    needs room for the whole model: they keep sizes, dtype and (the new) device, which
    is all that a capture asks of them. A pass that chooses by the values of weights
    (`weight-tying` with ``stages = "auto"``) asks for more: then all are moved, and go
    when everything is compiled (`StagedModel.release`).

    Returns the bytes given up. ``model`` cannot run by itself afterwards.
    """
    own, freed = {layer for stage in stages for layer in stage}, 0
    if not _chooses_by_weights(config):
        freed = sum(_hollow(p, device) for p in foreign_parameters(model, own))
    model.to(device)
    return freed


def _chooses_by_weights(config: Any) -> bool:
    passes = load_config(config).pipeline
    return any(item.selects_over == "weights" for item in passes)


def foreign_parameters(model: nn.Module, own: Container[int]) -> Iterable[nn.Parameter]:
    """Return the parameters that only layers outside of ``own`` have."""
    layers = find_stack(model).layers
    others = [layer for i, layer in enumerate(layers) if i not in own]
    apart = {id(p): p for layer in others for p in layer.parameters()}
    inside = {id(module) for layer in others for module in layer.modules()}
    for module in model.modules():
        if id(module) not in inside:
            for parameter in module.parameters(recurse=False):
                apart.pop(id(parameter), None)
    return apart.values()


def _hollow(parameter: nn.Parameter, device: torch.device | str) -> int:
    """Take a parameter's memory; return the bytes."""
    local = local_part(parameter)
    size = local.nbytes
    if local is not parameter:  # a rank's part lies where its mesh is
        _let_go(local)
        return size
    empty = torch.empty_like(parameter, device=device)
    give_up([empty])
    old, parameter.data = parameter.data, empty.detach()
    _let_go(old)
    return size


def _let_go(values: Tensor) -> None:
    """Free memory that is of these values alone, and pages of a file."""
    alone = values.untyped_storage().nbytes() == values.nbytes
    if alone and give_up([values]):
        return
    if values.is_cpu and values.is_contiguous():
        forget(values)
