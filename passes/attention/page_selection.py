"""`page-selection`: a decoding step reads the pages that matter, where they lie."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar

from pydantic import Field
from torch import fx
from torch.fx.experimental.symbolic_shapes import statically_known_true

from graphopt.codegen.pages import PAGE
from graphopt.ir.attention import AttentionSite
from graphopt.ir.model_graph import ModelGraph
from graphopt.ir.pages import read_of, replace_by_pages
from graphopt.passes.base import Pass, PassContext, PassResult, option
from graphopt.remarks import Remark, applied, missed


@dataclass(frozen=True, kw_only=True)
class PageSelection(Pass):
    """Let a decoded token read some pages of `graphopt.Cache`, chosen by its query.

    Each page of 64 tokens has the smallest and the largest key of every 16 of them; a
    query's largest possible product with these is the page's score. A KV head reads the
    page of the first token, the newest page and the best others, together ``budget``
    tokens, and chooses again every ``interval`` tokens. Streaming heads read the ring
    that they keep. Approximate; while the budget covers the context every page is read.
    Pays in every decoding step: without it the whole cache is copied before it is read.

    Before::

        %kv = graphopt.read_pages(%pages, ..., %statistics, %selected, %at, %tokens)
        %o = sdpa(%q, %kv[0], %kv[1])

    After::

        %o = graphopt.page_attention(%q, %pages, ..., %selected, %at, None, 64, 4)

    Refuses when

    - ``not-decode``: more than one query row;
    - ``no-pages``: keys and values do not come out of a `graphopt.Cache`;
    - ``model-window``: the model itself attends to a window already;
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

    def run(self, model: ModelGraph, context: PassContext) -> PassResult:
        """Rewrite the decoding sites that read pages."""
        remarks = [self._visit(model, site) for site in model.attention]
        changed = any(r.kind == "applied" for r in remarks)
        return PassResult(changed, tuple(remarks), {"sites": len(remarks)})

    def _visit(self, model: ModelGraph, site: AttentionSite) -> Remark:
        name, read = f"attention[{site.index}]", read_of(site)
        if refusal := self._refusal(site, read):
            return missed(name, *refusal)
        assert read is not None
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
