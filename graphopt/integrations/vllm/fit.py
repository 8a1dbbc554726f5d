"""Which passes vLLM has a hook for, and why it has none for the others."""

from __future__ import annotations

from graphopt.passes.attention.page_selection import PageSelection
from graphopt.passes.attention.sparse_attention import SparseAttention
from graphopt.passes.base import Pass

# Passes that are attention here, and no rewrites of a graph.
ATTENTION = ("sparse-attention", "page-selection")

_SCHEDULER = (
    "vLLM's scheduler does it: prompts come in chunks that ride with decodes "
    "(--enable-chunked-prefill, --max-num-batched-tokens)"
)
_REASONS = {
    "token-drop": "vLLM fixes a step's tokens (query_start_loc, slot_mapping) before "
    "the graph runs and counts cache blocks for all layers alike",
    "packed-prefill": "vLLM's batches have no padding: prompts lie end to end already",
    "ragged-batch": "vLLM's batches are ragged already",
    "chunked-prefill": _SCHEDULER,
    "schedule": _SCHEDULER,
    "logit-arithmetic": "each model has a graph of its own here; name the small models "
    "under 'ensemble' and a logits processor combines them",
    "structured-mask": "attention is an operator of vLLM's without a mask",
    "skinny-linear": "one graph serves every number of rows; it needs to know few",
}
_CORE = (
    "a prompt's core neurons belong to its request, and vLLM's graphs do not tell "
    "whose tokens they compute; use method = 'cats' or 'teal'"
)
_CODES = (
    "kv_dtype = '{}': keys and values lie in vLLM's cache, in the model's dtype; leave "
    "it out"
)
_STATIC = ("a-shape", "streaming", "sliding-window", "dense")
_SELECTING = (
    "'{}' chooses keys by the last queries of a whole prompt, of which vLLM shows a "
    "chunk at a time; use pattern = 'a-shape', 'streaming' or 'sliding-window'"
)


def refusal(item: Pass) -> str:
    """Return why vLLM cannot have ``item``; nothing where it can."""
    if item.name == "neuron-mask" and item.options().get("method", "core") == "core":
        return _CORE
    if isinstance(item, PageSelection):
        return "" if item.kv_dtype == "model" else _CODES.format(item.kv_dtype)
    if isinstance(item, SparseAttention):
        return _selecting(item)
    return _REASONS.get(item.name, "")


def _selecting(item: SparseAttention) -> str:
    table = item.heads_table()
    rules = [*item.heads, *(table.rules if table else ())]
    patterns = [item.pattern, *(r.pattern for r in rules if r.pattern)]
    patterns += [p.pattern for layer in (table.layers if table else ()) for p in layer]
    wrong = next((p for p in patterns if p not in _STATIC), None)
    return _SELECTING.format(wrong) if wrong else ""
