"""Ranks of a pipeline make sure that they run the same before they wait for others."""

from __future__ import annotations

from typing import Any

import torch.distributed as dist
from torch import nn

from graphopt.distributed.fingerprint import (
    of_architecture,
    of_config,
    of_installation,
    of_weights,
)
from graphopt.distributed.ranks import differences
from graphopt.errors import GraphoptError, RanksError


def agree(
    group: dist.ProcessGroup | None, model: nn.Module, config: Any, **more: Any
) -> None:
    """Raise RanksError on every rank unless all have the same model and settings.

    A ConfigError that the config of one rank is, is raised on that rank, and as a
    difference on the others.
    """
    given: Any = model
    error: GraphoptError | None = None
    mine: dict[str, Any] = {**of_installation(), **more}
    mine |= {**of_architecture(given.config), **of_weights(model)}
    try:
        mine |= of_config(config)
    except GraphoptError as found:
        error, mine["the config"] = found, str(found)
    said: list[Any] = [None] * dist.get_world_size(group)
    dist.all_gather_object(said, mine, group)
    if error is not None:
        raise error
    if text := differences(said):
        raise RanksError(
            f"pipelining: the ranks do not run the same: {text}; make the pipeline "
            "with the same model, config and settings on every rank"
        )
