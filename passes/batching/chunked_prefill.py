"""`chunked-prefill`: a prompt of any length runs as chunks of one size."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar, Self

from pydantic import model_validator

from graphopt.errors import PassError
from graphopt.ir.attention.site import AttentionSite
from graphopt.ir.copying import copy_graph
from graphopt.ir.match import same_size, size_expr
from graphopt.ir.model_graph import ModelGraph
from graphopt.ir.tokens.chunk import chunk_tokens
from graphopt.passes.base import Pass, PassContext, PassResult, option
from graphopt.remarks import applied, missed


@dataclass(frozen=True, kw_only=True)
class ChunkedPrefill(Pass):
    """Run the layers on ``chunk`` tokens of the prompt after the other.

    A loop takes the place of the layers: its body, a graph for ``chunk`` tokens, is
    compiled once and serves prompts of every length. Keys and values of the chunks
    before lie in tensors of the loop, and each chunk attends to them and to itself. The
    last chunk ends with the prompt, and takes some tokens twice. What is in memory at
    once beside keys and values is the work of one chunk, and not of the prompt.
    Lossless: the same keys enter the same softmax. Pays where prompts are long and
    memory is short; passes that follow in the config rewrite the body (sparse attention
    selects for a chunk's queries among all keys).

    Before::

        %h = embedding(%ids) : f32[B, S, H]
        %o = sdpa(%q, %k, %v, is_causal=True)
        %logits = linear(%norm[:, -1:])

    After::

        %h = embedding(%ids) : f32[B, S, H]
        %layers, %k, %v = chunks(%h, %cos, %sin, ...)
          append_rows(%k, %keys, %past)
          %o = graphopt.attention(%q, %keys[:, :, :%seen], ..., 'causal', %past)
        %logits = linear(norm(%layers)[:, -1:])

    Refuses when

    - ``decode``: there is one token a row;
    - ``short``: the graph was traced for a prompt of one chunk;
    - ``bidirectional``: tokens attend to later ones, which are not there yet;
    - ``past``: keys of an earlier call are attended to;
    - ``attention``: some attention was not raised, or is sparse already: what makes it
      sparse comes behind chunked-prefill;
    - ``cannot-follow``: an operator between the layers' ends looks from one token at
      others (a convolution over tokens, a pooling).
    """

    name: ClassVar[str] = "chunked-prefill"
    source: ClassVar[str] = (
        "mllm-NPU (Xu et al. 2025, section 3.2); SARATHI (Agrawal et al. 2023)"
    )
    exact: ClassVar[bool] = True
    never_after: ClassVar[Mapping[str, str]] = {
        "sparse-attention": "put it behind, where it selects for a chunk's queries",
        "token-drop": "layers would keep different numbers of a chunk's tokens",
        "schedule": "it runs the chunks that this pass makes; put it behind",
        "packed-prefill": "packed rows hold several prompts; Engine runs chunks of "
        "many prompts together",
    }

    chunk: int = option(256, "tokens that run at once", "tokens")

    @model_validator(mode="after")
    def _some(self) -> Self:
        if self.chunk < 2:
            raise ValueError("chunk is at least 2 tokens")
        return self

    def run(self, model: ModelGraph, context: PassContext) -> PassResult:
        """Put all layers into the loop or leave the graph as it was."""
        if refusal := self._refusal(model):
            return PassResult(False, (missed("graph", *refusal),))
        before, sites = copy_graph(model.gm.graph), len(model.attention)
        try:
            chunk_tokens(model, self.chunk)
        except PassError as error:
            model.gm.graph = before
            return PassResult(False, (missed("graph", "cannot-follow", str(error)),))
        text = f"{sites} layers run on chunks of {self.chunk} tokens"
        return PassResult(True, (applied("graph", text),), {"sites": sites})

    def _refusal(self, model: ModelGraph) -> tuple[str, str] | None:
        if not model.attention or model.kind == "decode":
            return "decode", "there is no attention over several tokens a row"
        if isinstance(model.tokens, int) and model.tokens <= self.chunk:
            return "short", f"{model.tokens} tokens are one chunk"
        for site in model.attention:
            if refusal := _site_refusal(site):
                return refusal
        if unknown := [row for row in model.missed() if row[1] == "not-raised"]:
            return "attention", f"{unknown[0][0]}: {unknown[0][2]}"
        return None


def _site_refusal(site: AttentionSite) -> tuple[str, str] | None:
    name = f"attention[{site.index}]"
    if site.unsupported:
        return "attention", f"{name}: {site.unsupported}"
    if site.pattern == "full":
        return "bidirectional", f"{name} is not causal"
    lengths = (size_expr(site.query_len), size_expr(site.kv_len))
    if site.offset != 0 or not same_size(*lengths):
        return "past", f"{name} has {lengths[1]} keys for {lengths[0]} queries"
    if site.pattern not in ("causal", "sliding-window"):
        return "attention", f"{name} runs on the pattern '{site.pattern}' already"
    return None
