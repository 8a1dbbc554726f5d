"""MustDrop's first stage: what an encoder says about the patches of its images."""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction

import torch
from torch import fx

from graphopt.errors import PassError
from graphopt.ir.match import sizes_of
from graphopt.ir.model_graph import ModelGraph
from graphopt.ir.replace import call
from graphopt.ir.shards import summed_heads
from graphopt.ir.tokens.drop import scale_of, stream_behind
from graphopt.ir.vision.carry import carry_marks, projected_patches
from graphopt.ir.vision.encoder import VisionEncoder, find_encoder
from graphopt.ir.vision.insert import insert
from graphopt.ir.vision.span import LanguageGraph, VisionWrite
from graphopt.ops.tokens.windows import SIDE
from graphopt.remarks import Remark, analysis

_ops = torch.ops.graphopt
_EVERY = -2.0  # under every cosine


@dataclass(frozen=True)
class StageRule:
    """``key_share`` of the patches never go. Windows of patches become one: the share
    ``merge_share`` of them, or with ``similarity`` all that are so alike."""

    key_share: float
    merge_share: float = 0.0
    similarity: float | None = None


@dataclass(frozen=True)
class Stage:
    """What the stage found, as nodes of tokens, bool [B, S], or None.

    ``protected`` is the key set; ``gone`` has been merged into others, the share
    ``merged`` of all vision tokens, or one that depends on data (None).
    """

    protected: fx.Node | None = None
    gone: fx.Node | None = None
    merged: Fraction | None = Fraction(0)
    remarks: tuple[Remark, ...] = ()


def encoder_stage(model: LanguageGraph, rule: StageRule) -> Stage:
    """Insert merging and the key set; remarks say why they are off where they are.

    PassError where ranks would choose by parts of the encoder's heads.
    """
    span = model.span
    assert span is not None
    if not (rule.key_share or rule.merge_share or rule.similarity is not None):
        return Stage()
    encoder, reason = find_encoder(model.gm, span)
    if encoder is None:
        return Stage(remarks=(analysis("graph", "no-encoder-stage", reason),))
    if summed_heads(ModelGraph(model.gm), encoder.attention[-1]) is not None:
        raise PassError(
            "ranks share out the heads of the encoder, which choose patches"
        )
    try:
        return _Inserted(model, encoder, span.writes[0]).stage(rule)
    except PassError as error:
        return Stage(remarks=(analysis("graph", "no-encoder-stage", str(error)),))


class _Inserted:
    def __init__(
        self, model: LanguageGraph, encoder: VisionEncoder, write: VisionWrite
    ) -> None:
        self.gm, self.graph = model.gm, model.gm.graph
        self.encoder, self.write = encoder, write
        self.projected = projected_patches(write)
        self.scale = scale_of(encoder.attention[-1])

    def stage(self, rule: StageRule) -> Stage:
        """Insert all of it."""
        windows, merged, said = self._windows(rule)
        away = None if windows is None else self._merge(windows)
        gone = None if away is None else self._carry(away)
        protected = None
        left = self.encoder.patches * (1 - (merged or 0))
        count = math.ceil(Fraction(rule.key_share).limit_denominator(1000) * left)
        if count:
            protected = self._carry(self._keys(away, count))
            text = f"{count} of an image's patches stay to the end"
            said = (*said, analysis("graph", "key-set", text, patches=count))
        return Stage(protected, gone, merged, said)

    def _windows(
        self, rule: StageRule
    ) -> tuple[fx.Node | None, Fraction | None, tuple[Remark, ...]]:
        """Insert which windows merge, and return the share of the patches that go."""
        height, width = self.encoder.grid
        every = (height // SIDE) * (width // SIDE)
        by_data = rule.similarity is not None
        count = every if by_data else round(rule.merge_share * every)
        if not count:
            return None, Fraction(0), ()
        if not self._is_whole():
            text = "not all patches become one token each, so none are merged"
            return None, Fraction(0), (analysis("graph", "no-merge", text),)
        layers = ModelGraph(self.gm).layers
        node = self.encoder.attention[0].node
        first = next(layer for layer in layers if layer.attention.node is node)
        stream = stream_behind(first)
        with self.graph.inserting_before(stream.next):
            patches = insert(self.graph, "narrow", stream, 1, 1, self.encoder.patches)
            least = _EVERY if rule.similarity is None else rule.similarity
            args = (patches, height, width, count, least)
            windows = call(self.graph, _ops.alike_windows.default, args)
        if by_data:
            return windows, None, ()
        gone = Fraction(count * (SIDE * SIDE - 1), self.encoder.patches)
        text = f"{count} of {every} windows of an image become one token each"
        return windows, gone, (analysis("graph", "merged", text, windows=count),)

    def _is_whole(self) -> bool:
        """Tell whether the features are all patches of all images and nothing else."""
        images, patches, channels = sizes_of(self.projected)
        written = sizes_of(self.write.features)
        total = math.prod(written) - images * patches * channels
        return bool(total.equals(0)) if hasattr(total, "equals") else total == 0

    def _merge(self, windows: fx.Node) -> fx.Node:
        """Let what follows see merged patches; return those that are merged away."""
        selected, grid = self.encoder.selected, self.encoder.grid
        point = max(selected, windows, key=list(self.graph.nodes).index).next
        users = list(selected.users)
        with self.graph.inserting_before(point):
            args = (selected, windows, *grid)
            merged = call(self.graph, _ops.merge_windows.default, args)
            away = call(self.graph, _ops.merged_away.default, (windows, *grid))
        for user in users:
            user.replace_input_with(selected, merged)
        return away

    def _keys(self, away: fx.Node | None, count: int) -> fx.Node:
        last = self.encoder.attention[-1]
        with self.graph.inserting_before(self.write.node.next):
            args = (last.query, last.key, away, self.scale, count)
            return call(self.graph, _ops.class_keys.default, args)

    def _carry(self, marks: fx.Node) -> fx.Node:
        order = list(self.graph.nodes).index
        point = max(self.write.node, marks, key=order).next
        with self.graph.inserting_before(point):
            return carry_marks(self.graph, self.write, self.projected, marks)
