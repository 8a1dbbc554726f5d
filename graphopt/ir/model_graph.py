"""`ModelGraph`: the transformer inside an FX graph, as passes see it."""

from __future__ import annotations

from functools import cached_property
from typing import Any

from torch import SymInt, fx

from graphopt.ir.attention.site import AttentionSite, find_attention
from graphopt.ir.attention.unraised import unraised
from graphopt.ir.caches.sites import CacheSite, find_caches
from graphopt.ir.match import size_expr
from graphopt.ir.sites.ffn import FfnSite, find_ffn
from graphopt.ir.sites.linear import LinearSite, find_linears
from graphopt.ir.sites.norms import NormSite, find_norms
from graphopt.ir.sites.rotary import RotarySite, find_rotary
from graphopt.ir.sites.unplaced import unplaced
from graphopt.ir.sizes.symbols import TokenSymbols, find_symbols
from graphopt.ir.stream.ends import (
    EmbeddingSite,
    HeadSite,
    find_embeddings,
    find_head,
    token_embedding,
)
from graphopt.ir.stream.layers import Layer, between, inside
from graphopt.ir.stream.residual import ResidualStream, find_residual
from graphopt.ir.stream.trunk import Trunk


class ModelGraph:
    """A view over a graph module; sites are found once, when first asked for.

    Passes make a new view after an edit (the pipeline does).
    """

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm

    @cached_property
    def attention(self) -> list[AttentionSite]:
        """Return the attention sites in graph order."""
        return find_attention(self.gm)

    @cached_property
    def ffn(self) -> list[FfnSite]:
        """Return the feed-forward sites in graph order."""
        return find_ffn(self.gm)

    @cached_property
    def linears(self) -> list[LinearSite]:
        """Return the products with a parameter in graph order."""
        return find_linears(self.gm)

    @cached_property
    def norms(self) -> list[NormSite]:
        """Return the norms in graph order."""
        return find_norms(self.gm)

    @cached_property
    def residual(self) -> list[ResidualStream]:
        """Return the residual streams, one a stack of layers, in graph order."""
        sites: dict[fx.Node, int | None] = {s.node: s.index for s in self.attention}
        return find_residual(self._trunk, sites or dict.fromkeys(self._unraised))

    @cached_property
    def caches(self) -> list[CacheSite]:
        """Return the reads and writes of the key-value cache in graph order."""
        return find_caches(self.gm, self.attention)

    @cached_property
    def rotary(self) -> list[RotarySite]:
        """Return the rotary embeddings of queries and keys in graph order."""
        return find_rotary(self.gm, self.attention, self.caches, self.norms)

    @cached_property
    def head(self) -> HeadSite | None:
        """Return the LM head, or None."""
        return find_head(self.gm, self._embeddings, self._trunk)

    @cached_property
    def embedding(self) -> EmbeddingSite | None:
        """Return the embedding of the token ids, or None."""
        return token_embedding(self._embeddings, self.head)

    @cached_property
    def _trunk(self) -> Trunk:
        return Trunk(self.gm.graph, self.norms)

    @cached_property
    def _unraised(self) -> dict[fx.Node, str]:
        return unraised(self.gm.graph, {site.node for site in self.attention})

    @cached_property
    def _embeddings(self) -> list[EmbeddingSite]:
        return find_embeddings(self.gm)

    @cached_property
    def layers(self) -> list[Layer]:
        """Return the layers: each attention with all that belongs to it."""
        parts = [part for stream in self.residual for part in stream.layers]
        streams = {index: part for part in parts for index in part.attention}
        rotary = {site.index: site for site in self.rotary}
        caches = {site.index: site for site in self.caches}
        order = self._trunk.order
        starts = [order[site.node] for site in self.attention]
        ffn = between(starts, self.ffn, [order[f.down] for f in self.ffn])
        norms = between(starts, self.norms, [order[n.output] for n in self.norms])
        return [
            Layer(
                site.index,
                site,
                ffn[i],
                norms[i],
                streams.get(i),
                rotary.get(i),
                caches.get(i),
                inside(streams.get(i), self.linears, order),
            )
            for i, site in enumerate(self.attention)
        ]

    @cached_property
    def tokens(self) -> Any:
        """Return the number of query tokens: SymInt when symbolic, int when traced
        with a fixed length, None without attention."""
        return self.attention[0].query_len if self.attention else None

    @cached_property
    def symbols(self) -> TokenSymbols:
        """Return all sizes over the token count; found by solving in a static graph."""
        return find_symbols(
            self.gm, self.attention[0].query if self.attention else None
        )

    @cached_property
    def token_symbol(self) -> Any:
        """Return the sympy symbol of the token count.

        None without attention, and where a static graph leaves a size open.
        """
        if isinstance(self.tokens, SymInt):
            return size_expr(self.tokens)
        return self.symbols.symbol if self.symbols.reason is None else None

    @cached_property
    def kind(self) -> str:
        """Return prefill, decode, encoder, mixed (tokens of prompts and of steps, of
        several requests), or unknown (no attention)."""
        if not self.attention:
            return "unknown"
        if any(s.form == "paged" for s in self.attention):
            return "mixed"
        if isinstance(self.tokens, int) and self.tokens == 1:
            return "decode"
        causal = any(s.pattern != "full" for s in self.attention)
        masked = any(s.unsupported for s in self.attention)
        return "prefill" if causal or masked else "encoder"

    def missed(self) -> list[tuple[str, str, str]]:
        """Return (site, code, reason) of what raise could not recognise."""
        used = {site.node for site in self.attention}
        rows = [] if used else [("graph", "no-attention", "no attention was found")]
        rows += [
            (f"attention[{s.index}]", "unsupported", s.unsupported)
            for s in self.attention
            if s.unsupported
        ]
        rows += [(n.name, "not-raised", why) for n, why in self._unraised.items()]
        if not isinstance(self.tokens, SymInt) and self.symbols.ambiguous:
            rows.append(("graph", "ambiguous-tokens", str(self.symbols.reason)))
        return rows + unplaced(self.gm.graph, self.layers)
