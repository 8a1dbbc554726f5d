"""`sparse-attention`: prefill attention visits only part of the keys."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator
from torch.fx.experimental.symbolic_shapes import statically_known_true

from graphopt.codegen.predicates import BLOCK
from graphopt.errors import ConfigError, PassError
from graphopt.ir.attention.site import AttentionSite
from graphopt.ir.model_graph import ModelGraph
from graphopt.ir.shards import RankShare, share_of_heads
from graphopt.passes.attention.head_tables import HeadTable, read_table
from graphopt.passes.attention.heads import (
    HeadPattern,
    HeadRule,
    Index,
    Share,
    Stride,
    Tokens,
    Width,
)
from graphopt.passes.attention.plans import layer_plan
from graphopt.passes.base import Pass, PassContext, PassResult, option
from graphopt.remarks import Remark, applied, failure, missed


@dataclass(frozen=True, kw_only=True)
class SparseAttention(Pass):
    """Let each query of a prompt see a few columns and near or similar distances.

    Attention of a long prompt puts most of its mass on the first tokens, on near ones
    and on few columns and diagonals; the kernel visits only these. ``a-shape`` sees the
    first ``sink`` and the last ``window`` tokens, ``streaming`` the same in blocks of
    64, ``sliding-window`` has no sink, and in ``tri-shape`` the ``last`` rows see
    everything. ``vertical-slash`` adds, per head and prompt, the ``vertical`` columns
    and ``slash`` diagonals on which the last 64 queries put most mass. ``block-sparse``
    sees, per 64 rows, the ``blocks`` blocks of 64 keys whose mean key has the greatest
    product with the rows' mean query; ``antidiagonal``, per 128 rows, the heaviest
    blocks of 128 keys that hold ``threshold`` of the softmax mass in a map of sums over
    antidiagonals of ``stride`` rows and keys. Both always see the first block and the
    rows' own.

    Approximate; with a window of at least the prompt's length, a threshold of 1 or as
    many blocks as the prompt has, the dense kernel runs and the result is the dense
    one, bit for bit. Pays on prompts longer than about what is seen; shorter ones stay
    dense inside the same graph.

    Before::

        %o = sdpa(%q, %k, %v, is_causal=True, enable_gqa=True)

    After::

        %o = graphopt.attention(%q, %k, %v, None, 'a-shape', [128], [1024], 0)

    After, with vertical-slash::

        %l = graphopt.select_vertical_slash(%q, %k, None, [30], [100], [1000], [6096])
        %o = graphopt.visit_attention(%q, %k, %v, None, %l[0], %l[1], %l[2], %l[3], [0])

    After, with antidiagonal; ``%l`` is for heads of other patterns, here empty::

        %l = graphopt.select_vertical_slash(%q, %k, None, [0], [0], [0], [0])
        %b = graphopt.select_blocks(%q, %k, None, [0], [16], [0.9], 128)
        %o = graphopt.visit_attention(..., [0], 0, None, 0.0, 0, %b[0], %b[1], ..., 128)

    Refuses when

    - ``decode``: one query row, attended densely;
    - ``not-causal``: bidirectional attention has no recent past;
    - ``sharded``: heads are named, and which of them this rank has cannot be told;
    - ``model-window``: the model itself attends to a window already;
    - ``too-short``: the prompt's length is known and dense is predicted faster;
    - ``not-selected``: ``layers`` leaves the layer out, or all its heads are dense;
    - ``unsupported``: biases, sinks, dropout, or a mask that is data.
    """

    name: ClassVar[str] = "sparse-attention"
    source: ClassVar[str] = (
        "MInference (Jiang et al. 2024, A-shape, vertical-slash, block-sparse); LServe "
        "(Yang et al. 2025) and StreamingLLM (Xiao et al. 2023), streaming heads; "
        "SCBench (Li et al. 2025, tri-shape); XAttention (Xu et al. 2025, antidiagonal)"
    )
    never_after: ClassVar[Mapping[str, str]] = {
        "packed-prefill": "packed rows hold several prompts, and its lists one"
    }

    pattern: Literal[
        "a-shape",
        "streaming",
        "sliding-window",
        "tri-shape",
        "vertical-slash",
        "block-sparse",
        "antidiagonal",
    ] = option("a-shape", "which keys a query visits")
    sink: Tokens | None = option(
        None, "first tokens that every query sees: 128; vertical-slash 30", "tokens"
    )
    window: Width | None = option(
        None,
        "last tokens that a query sees, itself too: 1024; vertical-slash 100",
        "tokens",
    )
    vertical: Tokens = option(1000, "columns chosen beside the sinks (vertical-slash)")
    slash: Tokens = option(
        6096, "diagonals chosen beside the window's (vertical-slash)"
    )
    blocks: Width = option(100, "key blocks of 64 a row block sees (block-sparse)")
    stride: Stride = option(16, "rows and keys of an antidiagonal sum (antidiagonal)")
    threshold: Share = option(
        0.9, "share of a row block's mass that its blocks hold (antidiagonal)"
    )
    last: Tokens = option(100, "last rows that see everything (tri-shape)", "tokens")
    layers: list[Index] | None = option(None, "layers to rewrite; all when left out")
    table: str | None = option(
        None, "heads table: MInference's .json, DuoAttention's .tsv, or .toml", "file"
    )
    sparsity: Annotated[float, Field(ge=0, le=1)] = option(
        0.5, "share of streaming heads, the lowest gates of a .tsv table"
    )
    heads: list[HeadRule] = option([], "rows that override single heads, last wins")

    @model_validator(mode="after")
    def _multiples(self) -> Self:
        rows = [("", self._base())]
        rows += [
            (f"heads[{i}]: ", self._base().overridden(r))
            for i, r in enumerate(self.heads)
        ]
        for place, head in rows:
            sink, window = head.sizes()
            if head.pattern == "streaming" and (sink % BLOCK or window % BLOCK):
                raise ValueError(
                    f"{place}streaming rounds to blocks: sink = {sink} and window = "
                    f"{window} must be multiples of {BLOCK}"
                )
        if self.table is not None:
            self._read()
        return self

    def _read(self) -> None:
        """A table that cannot be read is an error of the config, not of a graph."""
        try:
            self.heads_table()
        except ConfigError as error:
            raise ValueError(str(error)) from None

    def _base(self) -> HeadPattern:
        sizes = (self.sink, self.window, self.vertical, self.slash, self.last)
        chosen = (self.blocks, self.stride, self.threshold)
        return HeadPattern(self.pattern, *sizes, *chosen)

    def run(self, model: ModelGraph, context: PassContext) -> PassResult:
        """Rewrite the causal prefill sites of the selected layers."""
        try:
            share = self._share(model)
        except PassError as error:
            return PassResult(False, (missed("graph", "sharded", str(error)),))
        if remarks := self._out_of_range(model, share.ranks):
            return PassResult(False, tuple(remarks))
        table = self.heads_table()
        if table is not None and (wrong := table.refusal(model, share.ranks)):
            return PassResult(False, (wrong,))
        remarks = [self._visit(model, site, share, context) for site in model.attention]
        changed = any(r.kind == "applied" for r in remarks)
        return PassResult(changed, tuple(remarks), {"sites": len(remarks)})

    def _out_of_range(self, model: ModelGraph, ranks: int) -> list[Remark]:
        count = len(model.attention)
        if not count:
            return []
        heads = ranks * max(site.num_heads for site in model.attention)
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

    def heads_table(self) -> HeadTable | None:
        """Return the table of heads that is named, None without one."""
        return read_table(self.table, self.sparsity) if self.table else None

    def _visit(
        self,
        model: ModelGraph,
        site: AttentionSite,
        share: RankShare,
        context: PassContext,
    ) -> Remark:
        name = f"attention[{site.index}]"
        if refusal := self._refusal(site):
            return missed(name, *refusal)
        plan = layer_plan(self._head_patterns(site, share.ranks))
        if plan is None:
            return missed(name, "not-selected", "every head of this layer is dense")
        # Forced or not, what a pattern covers whole stays dense: the keys are the same,
        # and the dense kernel gives the same bits as the unrewritten model.
        pays = plan.narrowest() + 1 if self.force else plan.pays_from(context.device)
        if statically_known_true(site.kv_len < pays):
            text = f"dense is predicted faster below {pays} tokens"
            return missed(name, "too-short", text, tokens=str(site.kv_len), pays=pays)
        # Planned for the whole model's heads: which kernel, and from which length.
        plan.part(share).rewrite(model.gm, site, pays)
        text = f"{plan.describe()}; dense below {pays} tokens"
        return applied(name, text, min_tokens=pays)

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

    def _share(self, model: ModelGraph) -> RankShare:
        """Return which heads this rank has, where a table or a row names some."""
        named = self.table or any(rule.heads is not None for rule in self.heads)
        if not named or not model.attention:
            return RankShare()
        return share_of_heads(model, model.attention[0])

    def _head_patterns(self, site: AttentionSite, ranks: int) -> list[HeadPattern]:
        """Return the pattern of every head of the model, whose part is at ``site``."""
        result, table = [], self.heads_table()
        group = site.num_heads // site.num_kv_heads
        for head in range(site.num_heads * ranks):
            found = self._base()
            if table is not None:
                found = table.pattern(site.index, head, group, found)
            for rule in self.heads:
                if rule.covers(site.index, head):
                    found = found.overridden(rule)
            result.append(found)
        return result
