"""Which part of a model this process holds, by how its parameters are spread."""

from __future__ import annotations

from typing import Any

from graphopt.errors import ConfigError
from graphopt.ir.shards import RankShare


def share_of_model(model: Any) -> RankShare:
    """Return this rank's part of a model whose parameters are DTensors.

    All of it where none is sharded, or without a model. ConfigError for a mesh of
    several axes, which does not tell along which of them heads are shared out.
    """
    for weight in model.parameters() if model is not None else ():
        if not any(p.is_shard() for p in getattr(weight, "placements", ())):
            continue
        mesh = weight.device_mesh
        if mesh.ndim != 1:
            raise ConfigError(
                f"Cache.from_config: the model is spread over a mesh of {mesh.ndim} "
                "axes; give each pipeline stage's model a mesh of its ranks alone, or "
                "streaming=... with this rank's heads"
            )
        return RankShare(mesh.get_local_rank(), mesh.size())
    return RankShare()
