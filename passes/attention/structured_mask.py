"""`structured-mask`: masks that a model builds become predicates of the kernel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch.fx.experimental.symbolic_shapes import statically_known_true

from graphopt.ir.attention.site import AttentionSite
from graphopt.ir.model_graph import ModelGraph
from graphopt.ir.replace import replace_site
from graphopt.passes.base import Pass, PassContext, PassResult
from graphopt.remarks import Remark, applied, missed


@dataclass(frozen=True, kw_only=True)
class StructuredMask(Pass):
    """Run causal, windowed and padded attention on the kernel that knows the mask.

    A compiled model without a cache hands an explicit [B, 1, S, S] mask and repeated KV
    heads to attention, and a sliding-window model computes every key only to discard
    most. The mask's graph is read back as a predicate over (query, key), with padding
    as a [B, S] key mask; the kernel visits only the keys that the predicate allows.
    Lossless: the same keys enter the same softmax, in another order of summation.

    Before::

        %m = and(le(%k, %q), index(%padding, %b, %k))
        %key = reshape(expand(%k_heads))
        %o = sdpa(%q_heads, %key, %value, attn_mask=%m)

    After::

        %o = graphopt.attention(%q_heads, %k_heads, %v_heads, %padding, 'causal')

    Refuses when

    - ``no-mask``: the model already passes a structured form (``is_causal``);
    - ``decode``: there is a single query row;
    - ``bidirectional``: nothing would be skipped;
    - ``padding-rows``: padding is hidden with a finite number (eager attention), so
      that a row of padding, which sees no key, is the mean of all values;
    - ``unsupported``: biases, sinks, dropout, or a mask that is data.
    """

    name: ClassVar[str] = "structured-mask"
    source: ClassVar[str] = "lossless; FlashAttention-2 (Dao 2023) with loop bounds"
    exact: ClassVar[bool] = True

    def run(self, model: ModelGraph, context: PassContext) -> PassResult:
        """Rewrite every site whose mask is explicit and causal or windowed."""
        remarks = [self._visit(model, site) for site in model.attention]
        changed = any(r.kind == "applied" for r in remarks)
        return PassResult(changed, tuple(remarks), {"sites": len(remarks)})

    def _visit(self, model: ModelGraph, site: AttentionSite) -> Remark:
        name = f"attention[{site.index}]"
        if refusal := _refusal(site):
            return missed(name, *refusal)
        replace_site(
            model.gm, site, pattern=site.pattern, sink=[0], window=[site.window or 0]
        )
        window = f", window {site.window}" if site.pattern == "sliding-window" else ""
        padding = ", padding as key mask" if site.key_mask is not None else ""
        return applied(name, f"explicit mask became '{site.pattern}'{window}{padding}")


def _refusal(site: AttentionSite) -> tuple[str, str] | None:
    if site.form == "op":
        return "done", "the site already runs on the structured kernel"
    if site.unsupported:
        return "unsupported", site.unsupported
    if statically_known_true(site.query_len == 1):
        return "decode", "one query row reads every visible key; nothing to skip"
    if site.pattern == "full":
        return "bidirectional", "every key is visible to every query but for padding"
    if site.hides_finitely and site.key_mask is not None:
        return "padding-rows", "rows of padding average all values; the kernel gives 0"
    if site.mask is None and site.pattern != "sliding-window":
        return "no-mask", "the model passes is_causal and no mask"
    return None
