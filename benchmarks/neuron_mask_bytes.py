"""Which bytes a decoding step has to read: weights once, and the keys and values.

What a config leaves out is taken from what it says (the neurons of its buffers, the
levels, the sparsity) and from where it was applied, and not from what a kernel did, so
that a row can be held against the most that its bytes allow.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from torch import nn

from graphopt.calibration.levels import Levels
from graphopt.remarks import Remark
from graphopt.runtime.cache import Cache

_SCALE = 4  # bytes of an output's float32 scale
_KV_SCALES = 4  # bytes of the float16 scales of a token's key, or value, of one head
_GATED = ("up_proj", "down_proj")  # what CATS skips by closed gates


def linear_bytes(model: nn.Module, codes: bool) -> dict[str, float]:
    """Return the bytes of each linear, the head too, by its weight's name."""
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            weight = module.weight
            size = weight.numel() + _SCALE * len(weight) if codes else weight.nbytes
            found[f"{name}.weight"] = float(size)
    return found


def without_core(
    linears: Mapping[str, float], model: nn.Module, cache: Cache
) -> dict[str, float]:
    """Return ``linears`` with a cache's buffers in the place of the FFNs it masks."""
    assert cache.neurons is not None
    found = dict(linears)
    for layer, held in cache.neurons.layers.items():
        start = f"model.layers.{layer}.mlp."
        for name in [name for name in found if name.startswith(start)]:
            part = name.removeprefix(start).removesuffix("_proj.weight")
            kept = (getattr(held, part), getattr(held, f"{part}_scales"))
            found[name] = sum(t.nbytes for t in kept if t is not None)
    return found


def without_small(
    linears: Mapping[str, float], levels: Levels, remarks: Iterable[Remark]
) -> dict[str, float]:
    """Return what `teal` reads of ``linears``, less its levels where it was applied."""
    found = dict(linears)
    for layer, index in _applied(remarks, "linear"):
        start = f"model.layers.{layer}."
        # Linears of a layer are numbered in the order in which they run.
        name = [name for name in linears if name.startswith(start)][index]
        found[name] *= 1 - (levels.of(name) or 0.0)
    return found


def without_closed(
    linears: Mapping[str, float], sparsity: float, remarks: Iterable[Remark]
) -> dict[str, float]:
    """Return what `cats` reads of ``linears``, less its sparsity where applied."""
    found = dict(linears)
    for layer, _ in _applied(remarks, "ffn"):
        for part in _GATED:
            found[f"model.layers.{layer}.mlp.{part}.weight"] *= 1 - sparsity
    return found


def other_bytes(model: nn.Module) -> int:
    """Return the bytes of what is neither a linear nor an embedding: the norms."""
    whole = (nn.Linear, nn.Embedding)
    modules = [m for m in model.modules() if not isinstance(m, whole)]
    return sum(p.nbytes for m in modules for p in m.parameters(recurse=False))


def kv_bytes(config: Any, tokens: float, codes: bool) -> float:
    """Return the bytes of ``tokens`` keys and values in all layers."""
    width = config.head_dim + _KV_SCALES if codes else 4 * config.head_dim
    heads = config.num_key_value_heads
    return 2.0 * config.num_hidden_layers * heads * width * tokens


def _applied(remarks: Iterable[Remark], kind: str) -> list[tuple[int, int]]:
    """Return (layer, number) of the sites that `neuron-mask` has rewritten."""
    found = []
    for remark in remarks:
        if remark.pass_name == "neuron-mask" and remark.kind == "applied":
            layer, site = remark.site.split(".")
            assert site.startswith(kind)
            found.append((_number(layer), _number(site)))
    return found


def _number(place: str) -> int:
    return int(place.split("[")[1].removesuffix("]"))
