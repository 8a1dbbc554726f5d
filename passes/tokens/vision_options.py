"""The options of `token-drop` about the tokens of images."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from graphopt.passes.base import Pass, option

Threshold = Annotated[float, Field(ge=0)]
Part = Annotated[float, Field(ge=0, le=1)]


@dataclass(frozen=True, kw_only=True)
class VisionOptions(Pass):
    """What a pass is told about the vision tokens of a prompt."""

    tokens: Literal["all", "vision"] = option(
        "all", "which tokens drop out and shares are of; method must: vision tokens"
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
