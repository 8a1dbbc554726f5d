"""Where tokens are dropped, and how many stay."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Annotated, Self

from pydantic import ConfigDict, Field, model_validator

Share = Annotated[float, Field(gt=0, le=1)]


@dataclass(frozen=True, kw_only=True)
class DropPoint:
    """Tokens are dropped behind a layer: ``layer`` (zero-based), or the last one that
    ends within the share ``depth`` of all layers.

    ``keep``: the share of the prompt's tokens that live behind it; or ``percentile``:
    of the tokens alive, those whose score is under it are dropped.
    """

    __pydantic_config__ = ConfigDict(extra="forbid", strict=True)

    layer: Annotated[int, Field(ge=0)] | None = None
    depth: Annotated[float, Field(gt=0, lt=1)] | None = None
    keep: Share | None = None
    percentile: Annotated[float, Field(ge=0, lt=100)] | None = None

    @model_validator(mode="after")
    def _one_of_each(self) -> Self:
        if (self.layer is None) == (self.depth is None):
            raise ValueError("give a point either 'layer' or 'depth'")
        if (self.keep is None) == (self.percentile is None):
            raise ValueError("give a point either 'keep' or 'percentile'")
        return self

    def at(self, layers: int) -> int:
        """Return the layer of a model of ``layers`` behind which tokens are dropped."""
        if self.layer is not None:
            return self.layer
        assert self.depth is not None
        return max(0, int(self.depth * layers + 1e-9) - 1)


@dataclass(frozen=True)
class Step:
    """Behind ``layer``: the share ``keep`` of the tokens that reach it stays, which is
    ``alive`` of the prompt's."""

    layer: int
    keep: Fraction
    alive: Fraction


def steps(points: Sequence[DropPoint], layers: int) -> list[Step]:
    """Return the schedule for a model of ``layers``, in their order.

    Raises ValueError where two points fall on one layer, a layer is the last one or
    beyond, or more tokens would live behind a layer than reach it.
    """
    placed = sorted(((point.at(layers), point) for point in points), key=lambda p: p[0])
    for (one, _), (other, _) in pairwise(placed):
        if one == other:
            raise ValueError(f"two points of the schedule are behind layer {one}")
    if placed and placed[-1][0] > layers - 2:
        last = placed[-1][0]
        raise ValueError(
            f"behind layer {last} no layer is left to save; the model has {layers}"
        )
    alive, found = Fraction(1), []
    for layer, point in placed:
        share = _alive(point, alive)
        if share > alive:
            raise ValueError(
                f"behind layer {layer} {float(share):g} of the tokens would live, and "
                f"only {float(alive):g} reach it"
            )
        found.append(Step(layer, share / alive, share))
        alive = share
    return found


def _alive(point: DropPoint, alive: Fraction) -> Fraction:
    if point.keep is not None:
        return Fraction(point.keep).limit_denominator(1000)
    assert point.percentile is not None
    return alive * (1 - Fraction(point.percentile).limit_denominator(1000) / 100)
