"""`token-drop` on vision tokens: MustDrop, and the baselines on images alone."""

from __future__ import annotations

from fractions import Fraction
from itertools import pairwise
from typing import Any

from torch import fx

from graphopt.ir.tokens.drop import attention_scores, spread_scores
from graphopt.ir.tokens.vision_drop import (
    VisionDrop,
    VisionTokens,
    count_vision,
    drop_vision,
    dual_scores,
)
from graphopt.ir.vision.span import LanguageGraph
from graphopt.ir.vision.stage import Stage, encoder_stage
from graphopt.passes.tokens.schedule import DropPoint, Step
from graphopt.passes.tokens.vision_options import VisionOptions
from graphopt.remarks import Remark, applied

# Behind these of 32 layers MustDrop drops.
_LAYERS, _OF = (2, 6, 10, 14), 32
# Equal ratios from point to point; over the layers of a 32-layer model a third of the
# vision tokens live, which is the 192 of 576 that the paper's first preset averages.
_KEEP = (0.62, 0.39, 0.24, 0.15)
SEED = 0  # of random drops
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
    gm: fx.GraphModule, method: str, options: VisionOptions, plan: list[Step]
) -> tuple[Remark, ...]:
    """Insert the drops of ``plan``; shares are of the vision tokens.

    PassError where the graph cannot follow: the caller keeps a copy.
    """
    model = LanguageGraph(gm)
    stage = Stage()
    if method == "must":
        stage = encoder_stage(model, options.key_share)
    tokens = count_vision(model, stage.protected)
    scores = _scores(model, method, options, plan, tokens)
    shares = [Fraction(1), *(step.alive for step in plan)]
    for step, (before, after) in reversed(
        list(zip(plan, pairwise(shares), strict=True))
    ):
        drop = VisionDrop(step.layer, before, after, scores[step.layer])
        drop_vision(LanguageGraph(gm), tokens, drop)
    remarks = [
        applied(
            f"layer[{step.layer}]",
            f"{float(step.alive):.3g} of the vision tokens live behind it",
            alive=float(step.alive),
        )
        for step in plan
    ]
    return (*stage.remarks, *remarks)


def _scores(
    model: LanguageGraph,
    method: str,
    options: VisionOptions,
    plan: list[Step],
    tokens: VisionTokens,
) -> dict[int, Any]:
    layers = {step.layer: model.layers[step.layer] for step in plan}
    if method == "uniform":
        return dict.fromkeys(layers)
    if method == "lazy":
        return {i: attention_scores(model, layer) for i, layer in layers.items()}
    if method == "must":
        both = (options.global_threshold, options.individual_threshold)
        return {i: dual_scores(model, la, tokens, both) for i, la in layers.items()}
    first = layers[plan[0].layer]
    once = (
        attention_scores(model, first)
        if method == "fastv"
        else spread_scores(model, first, SEED)
    )
    return dict.fromkeys(layers, once)
