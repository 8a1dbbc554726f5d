"""`sparse-attention`: prefill attention visits only part of the keys."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal, Self

from pydantic import model_validator
from torch.fx.experimental.symbolic_shapes import statically_known_true

from graphopt import cost
from graphopt.ir.attention import AttentionSite
from graphopt.ir.model_graph import ModelGraph
from graphopt.ir.replace import replace_site
from graphopt.passes.attention.heads import (
    STREAMING_BLOCK,
    HeadPattern,
    HeadRule,
    Index,
    LayerPattern,
    Tokens,
    Width,
    layer_pattern,
)
from graphopt.passes.base import Pass, PassContext, PassResult, option
from graphopt.remarks import Remark, applied, failure, missed


@dataclass(frozen=True, kw_only=True)
class SparseAttention(Pass):
    """Let each query of a prompt see the first ``sink`` and the last ``window`` tokens.

    Attention of a long prompt puts most of its mass on the first tokens and on near
    ones; the kernel visits only these, so that its work grows with the length and not
    with its square. ``a-shape`` is token-exact, ``streaming`` rounds the window to
    blocks of 64, ``sliding-window`` has no sink. Approximate; with a window of at least
    the prompt's length the result is the dense one, bit for bit. Pays on prompts
    longer than about the window; shorter ones stay dense inside the same graph.

    Before::

        %o = sdpa(%q, %k, %v, is_causal=True, enable_gqa=True)

    After::

        %o = graphopt.attention(%q, %k, %v, None, 'a-shape', [128], [1024], 0)

    Refuses when

    - ``decode``: one query row, attended densely;
    - ``not-causal``: bidirectional attention has no recent past;
    - ``model-window``: the model itself attends to a window already;
    - ``too-short``: the prompt's length is known and dense is predicted faster;
    - ``not-selected``: ``layers`` leaves the layer out, or all its heads are dense;
    - ``unsupported``: biases, sinks, dropout, or a mask that is data.
    """

    name: ClassVar[str] = "sparse-attention"
    source: ClassVar[str] = (
        "MInference (Jiang et al. 2024, A-shape); LServe (Yang et al. 2025) and "
        "StreamingLLM (Xiao et al. 2023), streaming heads"
    )

    pattern: Literal["a-shape", "streaming", "sliding-window"] = option(
        "a-shape", "which keys a query visits"
    )
    sink: Tokens = option(128, "first tokens that every query sees", "tokens")
    window: Width = option(1024, "last tokens that a query sees, itself too", "tokens")
    layers: list[Index] | None = option(None, "layers to rewrite; all when left out")
    heads: list[HeadRule] = option([], "table of rows that override single heads")

    @model_validator(mode="after")
    def _multiples(self) -> Self:
        for place, pattern, sink, window in self._rows():
            odd = sink % STREAMING_BLOCK or window % STREAMING_BLOCK
            if pattern == "streaming" and odd:
                raise ValueError(
                    f"{place}streaming rounds to blocks: sink = {sink} and window = "
                    f"{window} must be multiples of {STREAMING_BLOCK}"
                )
        return self

    def _rows(self) -> list[tuple[str, str, int, int]]:
        base = HeadPattern(self.pattern, self.sink, self.window)
        rows = [("", base)]
        rows += [
            (f"heads[{i}]: ", base.overridden(r)) for i, r in enumerate(self.heads)
        ]
        return [(place, h.pattern, h.sink, h.window) for place, h in rows]

    def run(self, model: ModelGraph, context: PassContext) -> PassResult:
        """Rewrite the causal prefill sites of the selected layers."""
        remarks = self._out_of_range(model)
        if remarks:
            return PassResult(False, tuple(remarks))
        remarks = [self._visit(model, site, context) for site in model.attention]
        changed = any(r.kind == "applied" for r in remarks)
        return PassResult(changed, tuple(remarks), {"sites": len(remarks)})

    def _out_of_range(self, model: ModelGraph) -> list[Remark]:
        count = len(model.attention)
        if not count:
            return []
        heads = max(site.num_heads for site in model.attention)
        named = [("layers", i, count) for i in self.layers or []]
        for rule in self.heads:
            named += [("heads.layers", i, count) for i in rule.layers or []]
            named += [("heads.heads", i, heads) for i in rule.heads or []]
        return [
            failure(
                "out-of-range",
                f"option '{key}' names {i}; the model has {limit}, "
                f"so use 0 to {limit - 1}",
            )
            for key, i, limit in named
            if i >= limit
        ]

    def _visit(
        self, model: ModelGraph, site: AttentionSite, context: PassContext
    ) -> Remark:
        name = f"attention[{site.index}]"
        if refusal := self._refusal(site):
            return missed(name, *refusal)
        try:
            layer = layer_pattern(self._head_patterns(site))
        except ValueError as error:
            return failure("mixed-patterns", f"layer {site.index}: {error}", name)
        if layer is None:
            return missed(name, "not-selected", "every head of this layer is dense")
        pays = self._pays_from(layer, context)
        if statically_known_true(site.kv_len < pays):
            text = f"dense is predicted faster below {pays} tokens"
            return missed(name, "too-short", text, tokens=str(site.kv_len), pays=pays)
        replace_site(
            model.gm,
            site,
            pattern=layer.pattern,
            sink=list(layer.sink),
            window=list(layer.window),
            min_tokens=pays,
        )
        return applied(name, self._describe(layer, pays), min_tokens=pays)

    def _refusal(self, site: AttentionSite) -> tuple[str, str] | None:
        if site.unsupported:
            return "unsupported", site.unsupported
        if statically_known_true(site.query_len == 1):
            return "decode", "one query row; decode attends to every key"
        if site.pattern == "full":
            return "not-causal", "every key is visible to every query"
        if site.pattern != "causal":
            return "model-window", f"the model's own mask is '{site.pattern}' already"
        if self.layers is not None and site.index not in self.layers:
            return "not-selected", "the option 'layers' leaves this layer out"
        return None

    def _head_patterns(self, site: AttentionSite) -> list[HeadPattern]:
        result = []
        for head in range(site.num_heads):
            found = HeadPattern(self.pattern, self.sink, self.window)
            for rule in self.heads:
                if rule.covers(site.index, head):
                    found = found.overridden(rule)
            result.append(found)
        return result

    def _pays_from(self, layer: LayerPattern, context: PassContext) -> int:
        """Below this length the op runs dense; the narrowest head decides.

        ``force`` still keeps dense what the pattern covers whole: the keys are the
        same, and the dense kernel gives the same bits as the unrewritten model.
        """
        pairs = sorted(set(zip(layer.sink, layer.window, strict=True)))
        covered = min(sink + window for sink, window in pairs) + 1
        if self.force:
            return min(window for _, window in pairs) + 1
        pays = min(
            cost.pays_from(layer.pattern, sink, window, context.device)
            for sink, window in pairs
        )
        return max(pays, covered)

    def _describe(self, layer: LayerPattern, pays: int) -> str:
        kinds = len(set(zip(layer.sink, layer.window, strict=True)))
        per_head = f" ({kinds} kinds of heads)" if kinds > 1 else ""
        return (
            f"{layer.pattern}, sink {min(layer.sink)}, window {min(layer.window)}"
            f"{per_head}; dense below {pays} tokens"
        )
