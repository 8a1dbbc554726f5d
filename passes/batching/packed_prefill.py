"""`packed-prefill`: a padded batch of prompts runs on its real tokens only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Literal, Self

from pydantic import model_validator

from graphopt.errors import PassError
from graphopt.ir.attention.site import AttentionSite
from graphopt.ir.casts import skip_casts
from graphopt.ir.copying import copy_graph
from graphopt.ir.match import same_size, shape_of, size_expr
from graphopt.ir.model_graph import ModelGraph
from graphopt.ir.tokens.pack import Packing, pack_tokens
from graphopt.passes.base import Pass, PassContext, PassResult, option
from graphopt.remarks import applied, missed


@dataclass(frozen=True, kw_only=True)
class PackedPrefill(Pass):
    """Lay the prompts of a padded batch end to end, so that no layer sees padding.

    The tokens of all prompts are packed in front of the first layer, with their
    positions; attention runs prompt by prompt in one launch, without a [S, S] mask; and
    keys and values, the tokens whose logits are asked for, and whatever else the model
    returns come back where the caller expects them, zeros for padding. Left- and
    right-padded batches, and masks with holes between tokens, give what the padded run
    gives: the same tokens are generated, up to rounding. Pays where prompts differ in
    length: linear layers cost as many tokens as there are, attention the sum of the
    squared lengths. A batch without padding runs as it is, but for two copies.

    ``flat`` packs without gaps: the number of tokens is known when the batch comes, and
    one graph serves every batch. ``bins`` packs each prompt into the fullest of the
    bins that has room for it, the longest first, bins as long as the longest prompt;
    with ``bins = K`` there is always room for K bins of the padded length, so that
    shapes do not depend on the data. On a GPU the lengths are waited for once a batch,
    unless the mask is on the host; there is no other synchronisation.

    Before::

        %h = embedding(%ids) : f32[B, S, H]
        %o = sdpa(%q, %k, %v, attn_mask=and(causal, %padding))
        %logits = linear(%norm[:, -1:])

    After::

        %places, %starts, %lengths, %slots = graphopt.pack_prompts(%padding)
        %h' = graphopt.take_packed(%h, %places, 1) : f32[B, L, H]
        %o = graphopt.packed_attention(%q, %k, %v, %starts, %lengths, S, 'causal')
        %logits = linear(graphopt.unpack_tokens(%norm, %slots, 1)[:, -1:])

    Refuses when

    - ``decode``: there is one token a row;
    - ``one-prompt``: the batch has one row;
    - ``no-padding``: the graph was traced without an attention mask, or ignores it;
    - ``past``: keys of an earlier call are attended to;
    - ``attention``: some attention was not raised, or is sparse already: packed-prefill
      comes first, and sparse attention has no place in packed rows yet;
    - ``masks``: layers hide different keys as padding;
    - ``cannot-follow``: an operator between the layers' ends looks from one token at
      others (a convolution over tokens, a pooling), so that they must stay in place.
    """

    name: ClassVar[str] = "packed-prefill"
    source: ClassVar[str] = "Prepacking (Zhao et al. 2024, algorithm 1)"
    exact: ClassVar[bool] = True
    never_after: ClassVar[Mapping[str, str]] = {
        "sparse-attention": "its lists are for rows with their padding",
        "token-drop": "packed rows have no order in which tokens could be fewer",
        "chunked-prefill": "a chunk's rows are of one length; Engine runs chunks of "
        "many prompts together",
    }

    mode: Literal["flat", "bins"] = option(
        "flat", "pack end to end, or into bins as long as the longest prompt"
    )
    bins: int | None = option(
        None, "mode bins: room for so many bins, always; by the batch when left out"
    )

    @model_validator(mode="after")
    def _bins_of_bins(self) -> Self:
        if self.bins is not None and (self.mode != "bins" or self.bins < 1):
            raise ValueError("bins counts the bins of mode = 'bins' and is at least 1")
        return self

    def run(self, model: ModelGraph, context: PassContext) -> PassResult:
        """Pack the whole graph or leave it as it was."""
        if refusal := _refusal(model):
            return PassResult(False, (missed("graph", *refusal),))
        before = copy_graph(model.gm.graph)
        sites = len(model.attention)
        try:
            pack_tokens(model, Packing(self.mode == "bins", self.bins or 0))
        except PassError as error:
            model.gm.graph = before
            return PassResult(False, (missed("graph", "cannot-follow", str(error)),))
        remark = applied("graph", f"{sites} layers run on the tokens of the prompts")
        return PassResult(True, (remark,), {"sites": sites})


def _refusal(model: ModelGraph) -> tuple[str, str] | None:
    if not model.attention or model.kind == "decode":
        return "decode", "there is no attention over several tokens a row"
    first = model.attention[0]
    if (shape_of(first.query) or ())[0] == 1:
        return "one-prompt", "one row has no padding to share"
    for site in model.attention:
        if refusal := _site_refusal(site, first):
            return refusal
    if unknown := [row for row in model.missed() if row[1] == "not-raised"]:
        return "attention", f"{unknown[0][0]}: {unknown[0][2]}"
    return None


def _site_refusal(site: AttentionSite, first: AttentionSite) -> tuple[str, str] | None:
    name = f"attention[{site.index}]"
    if site.unsupported:
        return "attention", f"{name}: {site.unsupported}"
    lengths = (size_expr(site.query_len), size_expr(site.kv_len))
    if site.offset != 0 or not same_size(*lengths):
        return "past", f"{name} has {lengths[1]} keys for {lengths[0]} queries"
    if site.pattern not in ("full", "causal", "sliding-window"):
        return "attention", f"{name} runs on the pattern '{site.pattern}' already"
    if site.key_mask is None:
        return "no-padding", f"no mask tells which keys of {name} are padding"
    if not _same_mask(site, first):
        return "masks", f"{name} and attention[0] hide keys by different masks"
    return None


def _same_mask(site: AttentionSite, first: AttentionSite) -> bool:
    """Layers of several kinds cast the caller's mask anew."""
    masks = (site.key_mask, first.key_mask)
    one, other = (None if m is None else skip_casts(m) for m in masks)
    return one is other
