"""`page-selection`: a decoding step reads the pages that matter, where they lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, model_validator
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from graphopt.codegen.pages import PAGE
from graphopt.errors import ConfigError, PassError
from graphopt.ir.attention.pages import read_of, replace_by_pages, ring_heads
from graphopt.ir.attention.site import AttentionSite
from graphopt.ir.model_graph import ModelGraph
from graphopt.ir.shards import RankShare
from graphopt.passes.attention.head_tables import (
    HeadTable,
    read_table,
    share_of_table,
)
from graphopt.passes.base import Pass, PassContext, PassResult, Selects, option
from graphopt.remarks import Remark, applied, missed

_ALL = RankShare()


@dataclass(frozen=True, kw_only=True)
class PageSelection(Pass):
    """Let a decoded token read some pages of `graphopt.Cache`, chosen by its query.

    Each page of 64 tokens has the mean key of every 16 of them, less and plus a little
    of its spread (``extremes``: the ends of each channel, as published). The largest
    product that a query can have with what lies between is the page's score. A KV head
    reads the page of the first token, the newest page and the best others, ``budget``
    tokens together, and chooses again every ``interval`` tokens. Streaming heads read
    the ring that they keep. Approximate; while the budget covers the context every page
    is read. Pays in every decoding step: without it the whole cache is copied before it
    is read.
    ``graphopt.Cache.from_config`` makes the cache that the other options ask for; where
    ranks share heads out it takes the model too, and keeps rings of this rank's.

    Before::

        %kv = graphopt.read_pages(%pages, ..., %statistics, %selected, %at, %tokens)
        %o = sdpa(%q, %kv[0], %kv[1])

    After::

        %o = graphopt.page_attention(%q, %pages, ..., %selected, %at, None, 64, 4)

    Refuses when

    - ``not-decode``: more than one query row;
    - ``no-pages``: keys and values do not come out of a `graphopt.Cache`;
    - ``model-window``: the model itself attends to a window already;
    - ``cache``: the cache keeps rings of other heads than ``table`` names;
    - ``sharded``: which of a table's heads this rank has cannot be told;
    - ``unsupported``: biases, sinks, dropout, or a mask that is data.
    """

    name: ClassVar[str] = "page-selection"
    source: ClassVar[str] = (
        "LServe (Yang et al. 2025, section 3.5, hierarchical pages, reuse of the "
        "choice); scores of Quest (Tang et al. 2024, equation 1)"
    )

    budget: Annotated[int, Field(ge=2 * PAGE, multiple_of=PAGE)] = option(
        4096, "tokens that a head reads, in whole pages", "tokens"
    )
    interval: Annotated[int, Field(ge=1, le=PAGE)] = option(
        4, "tokens after which pages are chosen again", "tokens"
    )
    kv_dtype: Literal["model", "int8", "int4"] = option(
        "model", "what the cache keeps keys and values as"
    )
    statistics: Literal["spread", "extremes"] = option(
        "spread",
        "what pages are judged by: mean key and spread, or each channel's ends",
    )
    table: str | None = option(
        None, "DuoAttention's .tsv: its streaming heads keep a ring only", "file"
    )
    sparsity: Annotated[float, Field(ge=0, le=1)] = option(
        0.5, "share of streaming heads, the lowest gates of the table"
    )
    sink: Annotated[int, Field(ge=0, multiple_of=PAGE)] = option(
        128, "first tokens that a ring keeps, in whole pages", "tokens"
    )
    local: Annotated[int, Field(ge=PAGE, multiple_of=PAGE)] = option(
        256, "newest tokens that a ring keeps at least, in whole pages", "tokens"
    )

    @property
    def selects_over(self) -> Selects:
        """Heads that share a KV head choose together, and are of one rank."""
        return "nothing" if self.table is None else "heads"

    @property
    def asks_ranks(self) -> bool:
        """A table's heads are those of the whole model: a rank takes its own."""
        return True

    @model_validator(mode="after")
    def _readable(self) -> Self:
        """A table that cannot be read is an error of the config, not of a graph."""
        if self.table is not None:
            try:
                self.heads_table()
            except ConfigError as error:
                raise ValueError(str(error)) from None
        return self

    def cache_options(self) -> dict[str, Any]:
        """Return the arguments of the `graphopt.Cache` for this pass."""
        kept = None if self.kv_dtype == "model" else self.kv_dtype
        sizes = {"sink": self.sink, "local": self.local}
        return {
            "kv_dtype": kept,
            "statistics": self.statistics,
            "streaming": None if self.table is None else self.streaming,
            **sizes,
        }

    def streaming(self, share: RankShare = _ALL) -> list[list[int]] | None:
        """Return the streaming KV heads of each layer, None without a table.

        Those of a rank's ``share`` by their numbers among its own.
        """
        table = self.heads_table()
        if table is None:
            return None
        rows = (enumerate(share.part(row)) for row in table.layers)
        return [[h for h, p in row if p.pattern == "streaming"] for row in rows]

    def heads_table(self) -> HeadTable | None:
        """Return DuoAttention's table of KV heads, None without one."""
        if self.table is None:
            return None
        table = read_table(self.table, self.sparsity)
        if not table.per_kv_head:
            raise ConfigError(f"{self.table}: rings are for KV heads: a .tsv of gates")
        return table

    def run(self, model: ModelGraph, context: PassContext) -> PassResult:
        """Rewrite the decoding sites that read pages."""
        table = self.heads_table()
        try:
            share = share_of_table(model, table)
        except PassError as error:
            return PassResult(False, (missed("graph", "sharded", str(error)),))
        if table is not None and (wrong := table.refusal(model, share.ranks)):
            return PassResult(False, (wrong,))
        rings = self.streaming(share)
        remarks = [self._visit(model, site, rings) for site in model.attention]
        changed = any(r.kind == "applied" for r in remarks)
        return PassResult(changed, tuple(remarks), {"sites": len(remarks)})

    def _visit(
        self, model: ModelGraph, site: AttentionSite, rings: list[list[int]] | None
    ) -> Remark:
        name, read = f"attention[{site.index}]", read_of(site)
        if refusal := self._refusal(site, read):
            return missed(name, *refusal)
        assert read is not None
        if rings is not None and (found := ring_heads(read)) != rings[site.index]:
            text = f"the cache keeps rings of this rank's KV heads {found}, and the "
            text += f"table of {rings[site.index]}: make it by "
            return missed(name, "cache", f"{text}Cache.from_config(config, model)")
        replace_by_pages(model.gm, site, read, self.budget // PAGE, self.interval)
        text = f"{self.budget} tokens, chosen again every {self.interval}"
        return applied(name, text, budget=self.budget)

    def _refusal(
        self, site: AttentionSite, read: fx.Node | None
    ) -> tuple[str, str] | None:
        if not statically_known_true(site.query_len == 1):
            return "not-decode", "more than one query row; prefill attends densely"
        if site.pattern == "pages":
            return "no-pages", "the pages are chosen already"
        if read is None:
            return "no-pages", "its keys do not come out of a graphopt.Cache"
        if site.unsupported:
            return "unsupported", site.unsupported
        if site.window:
            return "model-window", f"the model's own mask is '{site.pattern}' already"
        return None
