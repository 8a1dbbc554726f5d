"""The options of `neuron-mask`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from graphopt.passes.base import Pass, Selects, option

Share = Annotated[float, Field(gt=0, le=1)]

# Of 32 layers CoreInfer leaves the first six and the last five dense.
_FIRST, _END, _OF = 6, 27, 32


@dataclass(frozen=True, kw_only=True)
class NeuronOptions(Pass):
    """Which neurons of which layers a pass leaves out, and how they are told."""

    method: Literal["core", "teal", "cats"] = option(
        "core",
        "core: the prompt's own neurons, for all decoding; teal, cats: what each "
        "token hardly uses",
    )
    layers: list[int] | None = option(
        None,
        "layers that are rewritten; when left out the middle ones, for teal and cats "
        "all",
    )

    keep: Share = option(0.4, "core: share of a layer's neurons that decoding computes")
    token_ratio: Share = option(
        0.2, "core: share of a token's active neurons that count as its own"
    )
    criterion: Literal["abs", "signed"] = option(
        "abs",
        "core: active is what is not zero, or what is over zero (CoreInfer's; half of "
        "what gated networks compute is under it)",
    )
    mode: Literal["stability", "similarity"] = option(
        "stability", "core: the prompt's own neurons, or those of the nearest cluster"
    )
    clusters: str | None = option(
        None, "similarity: the .toml that `graphopt cluster` wrote", "file"
    )
    rows: Literal["union", "each"] = option(
        "union", "core: one choice for all rows of a batch, or one for each"
    )
    buffers: Literal["float", "int8"] = option(
        "float",
        "core: what the chosen neurons' weights are kept as: as they are, or in int8 "
        "with a scale each output",
    )
    min_tokens: Annotated[int, Field(ge=0)] | None = option(
        None,
        "core: shorter prompts stay dense; 200 when left out, 0 with clusters",
        "tokens",
    )
    refresh: Annotated[int, Field(ge=2)] | None = option(
        None,
        "core: every so many tokens one runs densely, is counted as so many, and the "
        "neurons are chosen again; never when left out",
        "tokens",
    )

    sparsity: Annotated[float, Field(ge=0, lt=1)] = option(
        0.5, "teal, cats: share of the inputs, or neurons, that are left out"
    )
    thresholds: str | None = option(
        None, "teal, cats: what `graphopt calibrate` wrote", "file"
    )
    levels: str | None = option(
        None,
        "teal: what `graphopt levels` wrote, a sparsity for each linear; the same for "
        "all when left out",
        "file",
    )

    @model_validator(mode="after")
    def _belong(self) -> Self:
        """Options that lack what belongs to them are an error of the config."""
        if (self.mode == "similarity") != (self.clusters is not None):
            raise ValueError(
                "mode = 'similarity' and clusters = FILE belong together; "
                "`graphopt cluster` writes the file"
            )
        if self.method != "core" and self.sparsity and self.thresholds is None:
            raise ValueError(
                f"method = '{self.method}' needs thresholds = FILE; `graphopt "
                "calibrate MODEL --text FILE` writes the file"
            )
        if self.method != "teal" and self.levels is not None:
            raise ValueError("levels belong to method = 'teal'; leave them out")
        return self

    @property
    def selects_over(self) -> Selects:
        """``core`` ranks neurons against one another; thresholds are of one each."""
        return "neurons" if self.method == "core" else "nothing"

    @property
    def asks_ranks(self) -> bool:
        """``core`` gathers what it ranks from all ranks."""
        return True

    @property
    def shortest(self) -> int:
        """Return the tokens of the shortest prompt that is not left dense."""
        if self.min_tokens is not None:
            return self.min_tokens
        return 200 if self.mode == "stability" else 0


def middle_layers(count: int) -> tuple[int, ...]:
    """Return CoreInfer's layers 6 to 26 of 32, rescaled to ``count`` layers."""
    return tuple(range(-(-_FIRST * count // _OF), _END * count // _OF))
