"""MustDrop's first stage: what an encoder says about the patches of its images."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import fx

from graphopt.errors import PassError
from graphopt.ir.replace import call
from graphopt.ir.tokens.drop import scale_of
from graphopt.ir.vision.carry import carry_marks, projected_patches
from graphopt.ir.vision.encoder import VisionEncoder, find_encoder
from graphopt.ir.vision.span import LanguageGraph
from graphopt.remarks import Remark, analysis

_ops = torch.ops.graphopt


@dataclass(frozen=True)
class Stage:
    """What the stage found: ``protected`` bool [B, S] is the key set, or None."""

    protected: fx.Node | None = None
    remarks: tuple[Remark, ...] = ()


def encoder_stage(model: LanguageGraph, key_share: float) -> Stage:
    """Insert the key set; a remark says why it is empty where it is."""
    span = model.span
    assert span is not None
    if not key_share:
        return Stage()
    encoder, reason = find_encoder(model.gm, span)
    if encoder is None:
        return Stage(None, (analysis("graph", "no-key-set", reason),))
    graph, write = model.gm.graph, span.writes[0]
    try:
        projected = projected_patches(write)
        scale = scale_of(encoder.attention[-1])
    except PassError as error:
        return Stage(None, (analysis("graph", "no-key-set", str(error)),))
    count = key_count(encoder, key_share)
    with graph.inserting_before(span.node.next):
        last = encoder.attention[-1]
        args = (last.query, last.key, scale, count)
        keys = call(graph, _ops.class_keys.default, args)
        protected = carry_marks(graph, write, projected, keys)
    text = f"{count} of {encoder.patches} patches of each image stay to the end"
    return Stage(protected, (analysis("graph", "key-set", text, patches=count),))


def key_count(encoder: VisionEncoder, share: float) -> int:
    """Return ceil(share * P)."""
    return math.ceil(share * encoder.patches - 1e-9)
