"""The options of `token-drop` about how tokens are ranked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field

from graphopt.ir.model_graph import ModelGraph
from graphopt.ir.stream.layers import Layer
from graphopt.ir.tokens.drop import Ranking, attention_scores, spread_scores
from graphopt.passes.base import Pass, Selects, option

_SEED = 0


def _odd(number: int) -> int:
    if number % 2 == 0:
        raise ValueError(f"{number} neighbours have no middle: use an odd number")
    return number


@dataclass(frozen=True, kw_only=True)
class RankingOptions(Pass):
    """By what a pass ranks the tokens that reach a layer."""

    method: Literal["lazy", "fastv", "random", "uniform", "pool", "must"] = option(
        "lazy", "how tokens are ranked"
    )
    observe: Annotated[int, Field(ge=1)] = option(
        1, "lazy, fastv: the attention of so many last tokens ranks the others"
    )
    smooth: Annotated[int, Field(ge=1), AfterValidator(_odd)] = option(
        1, "lazy, fastv: a token has the greatest score of so many neighbours"
    )

    @property
    def selects_over(self) -> Selects:
        """Scores are means over heads, but for the baselines'."""
        return "heads" if self.method in ("lazy", "fastv", "must") else "nothing"

    @property
    def asks_ranks(self) -> bool:
        """A mean over heads is summed over ranks, before any maximum is taken of it."""
        return True

    @property
    def ranking(self) -> Ranking:
        """Return how the attention of last tokens becomes scores."""
        return Ranking(self.observe, self.smooth)

    def scores(self, model: ModelGraph, layers: Mapping[int, Layer]) -> dict[int, Any]:
        """Insert the scores behind each of ``layers``, in their order; None is even."""
        if self.method in ("uniform", "pool"):
            return dict.fromkeys(layers)
        if self.method == "lazy":
            return {
                index: attention_scores(model, layer, self.ranking)
                for index, layer in layers.items()
            }
        first = next(iter(layers.values()))
        once = (
            attention_scores(model, first, self.ranking)
            if self.method == "fastv"
            else spread_scores(model, first, _SEED)
        )
        return dict.fromkeys(layers, once)
