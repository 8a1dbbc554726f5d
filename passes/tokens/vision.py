"""`token-drop` on vision tokens: MustDrop, and the baselines on images alone."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from typing import Any

from torch import SymInt, fx

from graphopt.errors import PassError
from graphopt.ir.tokens.vision_drop import (
    VisionDrop,
    VisionTokens,
    count_vision,
    drop_before_layers,
    drop_vision,
    dual_scores,
)
from graphopt.ir.vision.span import LanguageGraph
from graphopt.ir.vision.stage import Stage, StageRule, encoder_stage
from graphopt.passes.tokens.schedule import DropPoint, Step
from graphopt.passes.tokens.vision_options import VisionOptions
from graphopt.remarks import Remark, applied

# Behind these of 32 layers MustDrop drops.
_LAYERS, _OF = (2, 6, 10, 14), 32
# Equal ratios from point to point; over the layers of a 32-layer model a third of the
# vision tokens live, which is the 192 of 576 that the paper's first preset averages.
_KEEP = (0.62, 0.39, 0.24, 0.15)
NO_VISION = (
    "no image features are written among the embeddings; where a graph break parts "
    "them from the layers, call the model once before it is compiled and set "
    "TRANSFORMERS_DISABLE_TORCH_CHECK=1, or pass the features as mm_encoder_outputs"
)


def must_points(layers: int) -> list[DropPoint]:
    """Return MustDrop's points in a model of ``layers``; the later of equals stays."""
    scaled = {
        min(layers - 2, place * layers // _OF): keep
        for place, keep in zip(_LAYERS, _KEEP, strict=True)
    }
    return [DropPoint(layer=at, keep=keep) for at, keep in scaled.items() if at >= 0]


def drop_vision_tokens(
    gm: fx.GraphModule, options: VisionOptions, plan: list[Step]
) -> tuple[Remark, ...]:
    """Insert the drops of ``plan``; shares are of the vision tokens.

    PassError where the graph cannot follow: the caller keeps a copy.
    """
    model, method = LanguageGraph(gm), options.method
    by_data = method == "must" and options.mode == "threshold"
    stage = (
        encoder_stage(model, _rule(options, by_data)) if method == "must" else Stage()
    )
    if stage.gone is not None and not isinstance(model.tokens, SymInt):
        raise PassError("merging needs a prompt length that varies: dynamic=True")
    tokens = count_vision(model, stage.protected)
    scores = _scores(model, options, plan, tokens)
    bound = 1.0 if by_data else None  # scores are in units of the thresholds
    for step, (before, after) in reversed(_shares(plan, stage.merged)):
        here, pool = scores[step.layer], method == "pool"
        drop = VisionDrop(step.layer, before, after, here, bound, pool)
        drop_vision(LanguageGraph(gm), tokens, drop)
    if stage.gone is not None:
        drop_before_layers(LanguageGraph(gm), tokens, stage.gone, stage.merged)
    return (*stage.remarks, *(_said(step, by_data) for step in plan))


def _rule(options: VisionOptions, by_data: bool) -> StageRule:
    if by_data:
        return StageRule(options.key_share, similarity=options.similarity)
    return StageRule(options.key_share, options.merge_share)


def _shares(
    plan: list[Step], merged: Fraction | None
) -> list[tuple[Step, tuple[Fraction, Fraction]]]:
    """Return the shares of the vision tokens before and behind each step."""
    shares = [1 - (merged or Fraction(0)), *(step.alive for step in plan)]
    if shares[1] > shares[0]:
        raise PassError(
            f"merging leaves {float(shares[0]):.3g} of the vision tokens, and behind "
            f"layer {plan[0].layer} {float(shares[1]):.3g} are to live"
        )
    return list(zip(plan, pairwise(shares), strict=True))


def _said(step: Step, by_data: bool) -> Remark:
    where, alive = f"layer[{step.layer}]", float(step.alive)
    if by_data:
        return applied(where, "vision tokens under both thresholds go behind it")
    text = f"{alive:.3g} of the vision tokens live behind it"
    return applied(where, text, alive=alive)


def _scores(
    model: LanguageGraph,
    options: VisionOptions,
    plan: list[Step],
    tokens: VisionTokens,
) -> dict[int, Any]:
    layers = {step.layer: model.layers[step.layer] for step in plan}
    if options.method == "must":
        both = options.thresholds
        return {i: dual_scores(model, la, tokens, both) for i, la in layers.items()}
    return options.scores(model, layers)
