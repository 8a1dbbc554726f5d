"""Descendants: models of any depth whose layers start from an auxiliary's stages."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise

from torch import nn

from graphopt.errors import ConfigError
from graphopt.learngene.build import fill
from graphopt.learngene.depth import with_depth
from graphopt.learngene.stack import find_stack
from graphopt.learngene.tying import StagePlan, plan_of


def expand(
    auxiliary: nn.Module,
    map: Sequence[int] | None = None,
    *,
    depth: int | None = None,
) -> nn.Module:
    """Return a model whose layer i starts with the parameters of stage ``map[i]``.

    The map never decreases; ``depth`` makes one by `even_map`. Every layer then has
    parameters of its own, and the class is that of the model before `build`. What each
    layer of a stage had for itself (untied) is spread over the stage's new layers in
    order, so that the map of the auxiliary itself gives the same function. Embeddings,
    final norm and head are copied. Raises ConfigError for a map that does not fit.
    """
    plan = plan_of(auxiliary)
    if plan is None:
        raise ConfigError("expand needs an auxiliary model, which `build` makes")
    if (map is None) == (depth is None):
        raise ConfigError("expand: give either a map of layers to stages or a depth")
    if map is None:
        assert depth is not None
        map = even_map(len(plan.stages), depth)
    _check(map, len(plan.stages))
    sources = _sources(plan, map)
    stack = find_stack(auxiliary, plan.layers)
    made = with_depth(stack, sources)
    fill(made, stack, lambda i, _: [sources[i]])
    return made


def even_map(stages: int, depth: int) -> list[int]:
    """Return the stage of each of ``depth`` layers: as many each, the first ones more.

    even_map(5, 12) is the paper's 0,0,0,1,1,1,2,2,3,3,4,4; other depths go by the same
    rule, which the paper's code does not give.
    """
    if depth < stages:
        raise ConfigError(
            f"depth {depth} leaves out some of {stages} stages; say which with a map"
        )
    least, more = divmod(depth, stages)
    return [s for s in range(stages) for _ in range(least + (s < more))]


def _check(map: Sequence[int], stages: int) -> None:
    if not map or min(map) < 0 or max(map) >= stages:
        raise ConfigError(f"map {list(map)}: stages are counted from 0 to {stages - 1}")
    if any(later < earlier for earlier, later in pairwise(map)):
        raise ConfigError(f"map {list(map)}: a later layer is of an earlier stage")


def _sources(plan: StagePlan, map: Sequence[int]) -> list[int]:
    """Return the layer of the auxiliary that each new layer is copied from."""
    starts = [plan.stage_of().index(stage) for stage in map]
    found = []
    for i, stage in enumerate(map):
        place = i - map.index(stage)  # among the new layers of its stage
        spread = place * plan.stages[stage] // map.count(stage)
        found.append(starts[i] + spread)
    return found
