"""The options of `token-drop` about the tokens of images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from graphopt.passes.base import option
from graphopt.passes.tokens.ranking import RankingOptions

Threshold = Annotated[float, Field(ge=0)]
Part = Annotated[float, Field(ge=0, le=1)]
# The global and the individual threshold of the authors' scripts.
_PRESETS = {
    "192": (0.001, 0.001),
    "128": (0.0012, 0.001),
    "64": (0.011, 0.01),
    "64-vizwiz": (0.005, 0.001),
}


@dataclass(frozen=True, kw_only=True)
class VisionOptions(RankingOptions):
    """What a pass is told about the vision tokens of a prompt."""

    tokens: Literal["all", "vision"] = option(
        "all", "which tokens drop out and shares are of; method must: vision tokens"
    )
    mode: Literal["count", "threshold"] = option(
        "count",
        "must: a point's share of the vision tokens lives behind it, or all that is "
        "over a threshold, in the row where most are: a size that depends on data",
    )
    preset: Literal["192", "128", "64", "64-vizwiz"] | None = option(
        None,
        "must: MustDrop's thresholds for so many of 576 tokens on average; the first "
        "three on TextVQA",
    )
    global_threshold: Threshold = option(
        0.001, "must: share of the text's attention to all vision tokens, summed"
    )
    individual_threshold: Threshold = option(
        0.001, "must: attention from one text token, at most"
    )
    key_share: Part = option(
        0.08, "must: share of an image's patches that stay, by its class token"
    )
    merge_share: Part = option(
        0.0, "must, by count: share of the 3 x 3 windows that merge, the most alike"
    )
    similarity: Annotated[float, Field(ge=-1, le=1)] = option(
        0.8, "must, by threshold: mean cosine from which windows of patches merge"
    )

    @property
    def thresholds(self) -> tuple[float, float]:
        """Return the global and the individual threshold."""
        if self.preset is not None:
            return _PRESETS[self.preset]
        return self.global_threshold, self.individual_threshold
