"""`ragged-batch`: one batch of prompt chunks and decodes reads a pool of pages."""

from __future__ import annotations

from collections.abc import Container
from dataclasses import dataclass
from typing import ClassVar

from torch import fx

from graphopt.ir.attention.ragged import ragged_writes, read_ragged, written
from graphopt.ir.attention.site import AttentionSite
from graphopt.ir.model_graph import ModelGraph
from graphopt.passes.base import Pass, PassContext, PassResult
from graphopt.remarks import Remark, applied, missed


@dataclass(frozen=True, kw_only=True)
class RaggedBatch(Pass):
    """Let chunks of prompts and single decodes of many requests share a forward.

    The serving engine runs its steps so (`graphopt.runtime.Engine`): the tokens of all
    requests lie in one row, so that a linear layer sees one matrix, and each layer's
    keys and values are in pages. Attention, which the model spells for one row, becomes
    one launch over the rows of the batch, each with its own past (decode-maximal
    batches: decodes ride along with a chunk). All layers are rewritten or none: the
    graph as captured would mix the requests.

    Before::

        graphopt.append_ragged(%k, %v, %starts, %past, %table, %key_pages, ...)
        %o = sdpa(%q, %k, %v, is_causal=True)

    After::

        graphopt.append_ragged(%k, %v, %starts, %past, %table, %key_pages, ...)
        %o = graphopt.ragged_page_attention(%q, %starts, %past, %table, %key_pages,
            %value_pages, None, None, 'causal', [0], [0], 0.125)

    Refuses when

    - ``no-batch``: the graph writes no ragged batch to pages;
    - ``attention``: some attention was not raised, is not causal, has a mask that is
      data, or reads other keys than those that its layer writes.
    """

    name: ClassVar[str] = "ragged-batch"
    source: ClassVar[str] = (
        "SARATHI (Agrawal et al. 2023, section 4.3); Sarathi-Serve (2024, section 4)"
    )
    exact: ClassVar[bool] = True

    def run(self, model: ModelGraph, context: PassContext) -> PassResult:
        """Rewrite all sites or none."""
        writes = ragged_writes(model.gm)
        if not writes:
            text = "no ragged batch is written to pages: Engine runs such graphs"
            return PassResult(False, (missed("graph", "no-batch", text),))
        if refusal := _refusal(model, writes):
            return PassResult(False, (refusal,))
        remarks: list[Remark] = []
        for site in model.attention:
            read_ragged(model.gm, site, writes[written(site.key)])
            text = f"reads pages by row, {site.pattern}"
            remarks.append(applied(f"attention[{site.index}]", text))
        return PassResult(True, tuple(remarks), {"sites": len(remarks)})


def _refusal(model: ModelGraph, writes: Container[fx.Node]) -> Remark | None:
    for site in model.attention:
        if reason := _site_refusal(site, written(site.key) in writes):
            return missed(f"attention[{site.index}]", "attention", reason)
    unknown = [row for row in model.missed() if row[1] == "not-raised"]
    return missed(unknown[0][0], "attention", unknown[0][2]) if unknown else None


def _site_refusal(site: AttentionSite, has_pages: bool) -> str:
    if site.unsupported:
        return site.unsupported
    if site.pattern not in ("causal", "sliding-window"):
        return f"its pattern is '{site.pattern}'"
    if site.key_mask is not None:
        return "it hides keys by a mask"
    if site.offset != 0:
        return f"its first query is at position {site.offset}"
    return "" if has_pages else "its keys are not those that the layer writes to pages"
