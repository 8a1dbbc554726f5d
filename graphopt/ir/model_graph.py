"""`ModelGraph`: the transformer inside an FX graph, as passes see it."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import SymInt, fx

from graphopt.ir.attention import AttentionSite, find_attention
from graphopt.ir.ffn import FfnSite, find_ffn
from graphopt.ir.match import size_expr
from graphopt.ir.norms import NormSite, find_norms
from graphopt.ir.symbols import TokenSymbols, find_symbols
from graphopt.ir.unraised import unraised


@dataclass(frozen=True)
class Layer:
    """One transformer layer: its attention, and what follows up to the next one's."""

    index: int
    attention: AttentionSite
    ffn: tuple[FfnSite, ...]
    norms: tuple[NormSite, ...]


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
    def norms(self) -> list[NormSite]:
        """Return the norms in graph order."""
        return find_norms(self.gm)

    @cached_property
    def layers(self) -> list[Layer]:
        """Return the layers: each attention with the FFNs and norms nearest to it."""
        if not self.attention:
            return []
        order = {node: i for i, node in enumerate(self.gm.graph.nodes)}
        starts = [order[site.node] for site in self.attention]
        ends = [*starts[1:], len(order)]
        return [
            Layer(
                site.index,
                site,
                tuple(f for f in self.ffn if start <= order[f.down] < end),
                tuple(n for n in self.norms if start <= order[n.output] < end),
            )
            for site, start, end in zip(self.attention, starts, ends, strict=True)
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
        """Return prefill, decode, encoder, or unknown (no attention)."""
        if not self.attention:
            return "unknown"
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
        found = unraised(self.gm.graph, used)
        rows += [(name, "not-raised", reason) for name, reason in found]
        if not isinstance(self.tokens, SymInt) and self.symbols.ambiguous:
            rows.append(("graph", "ambiguous-tokens", str(self.symbols.reason)))
        return rows
