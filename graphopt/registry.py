"""The passes that a config can name: those of graphopt and those of plug-ins."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.metadata import EntryPoint, entry_points

from graphopt.errors import ConfigError, did_you_mean
from graphopt.passes.base import Pass

# name -> "module:class"; imported when first asked for, so a listing stays cheap.
_BUILT_IN = {
    "structured-mask": "graphopt.passes.attention.structured_mask:StructuredMask",
    "page-selection": "graphopt.passes.attention.page_selection:PageSelection",
    "chunked-prefill": "graphopt.passes.batching.chunked_prefill:ChunkedPrefill",
    "schedule": "graphopt.passes.batching.schedule:Schedule",
    "ragged-batch": "graphopt.passes.batching.ragged_batch:RaggedBatch",
    "packed-prefill": "graphopt.passes.batching.packed_prefill:PackedPrefill",
    "token-drop": "graphopt.passes.tokens.token_drop:TokenDrop",
    "logit-arithmetic": "graphopt.passes.logits.logit_arithmetic:LogitArithmetic",
    "neuron-mask": "graphopt.passes.ffn.neuron_mask:NeuronMask",
    "onednn-linear": "graphopt.passes.linear.onednn_linear:OneDnnLinear",
    "shadow-outlier": "graphopt.passes.linear.shadow_outlier:ShadowOutlier",
    "skinny-linear": "graphopt.passes.linear.skinny_linear:SkinnyLinear",
    "sparse-attention": "graphopt.passes.attention.sparse_attention:SparseAttention",
    "weight-tying": "graphopt.passes.weights.weight_tying:WeightTying",
}


@cache
def pass_names() -> tuple[str, ...]:
    """Return every pass that a config may name, sorted."""
    return tuple(sorted(_sources()))


@cache
def pass_class(name: str) -> type[Pass]:
    """Return the class of pass ``name``; ConfigError names the nearest right name."""
    sources = _sources()
    if name not in sources:
        raise ConfigError(f"unknown pass '{name}'{did_you_mean(name, sources)}")
    module, _, attribute = sources[name].partition(":")
    found: type[Pass] = getattr(import_module(module), attribute)
    return found


def _sources() -> dict[str, str]:
    """Join the built-in passes with entry points of group ``graphopt.passes``."""
    sources = dict(_BUILT_IN)
    owner = dict.fromkeys(sources, "graphopt")
    for point in entry_points(group="graphopt.passes"):
        distribution = _distribution(point)
        if point.name in sources:
            raise ConfigError(
                f"pass '{point.name}' comes from both {owner[point.name]} and "
                f"{distribution}; uninstall one of them"
            )
        sources[point.name] = point.value
        owner[point.name] = distribution
    return sources


def _distribution(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.value
