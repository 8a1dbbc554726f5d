"""Low-rank adapters over a model that keeps its weights: no second copy of them."""

from __future__ import annotations

import copy
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from graphopt.errors import ModelError

LowRank = tuple[Tensor, Tensor, float]
"""A [rank, in], B [out, rank] and the scale: x A^T B^T scale is added."""

_KEY = re.compile(
    r"^(?:base_model\.model\.)?(?P<module>.+)\.lora_(?P<side>[AB])(?:\.\w+)?\.weight$"
)
# What an adapter's config may say that a low-rank pair does not hold.
_UNKNOWN = {"use_dora": False, "modules_to_save": None, "bias": "none"}


class LowRankLinear(nn.Module):
    """A linear of the shared model, and a low-rank product beside it (LoRA).

    The product is one of its own (Hu et al. 2021, equation 3): the shared weight is not
    written to, so that a model with and one without the adapter can read it together.
    """

    down: Tensor
    up: Tensor

    def __init__(self, shared: nn.Module, pair: LowRank) -> None:
        super().__init__()
        self.shared = shared
        down, up, self.scale = pair
        like: Any = shared.weight
        for name, factor in (("down", down), ("up", up)):
            moved = factor.to(device=like.device, dtype=like.dtype).contiguous()
            self.register_parameter(name, nn.Parameter(moved, requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        """Return the shared linear of x [..., in], and scale * x A^T B^T."""
        low = nn.functional.linear(x, self.down)
        return self.shared(x) + nn.functional.linear(low, self.up) * self.scale


def with_low_rank(model: nn.Module, pairs: Mapping[str, LowRank]) -> nn.Module:
    """Return a twin of ``model`` with low-rank pairs at the modules of these names.

    All parameters and buffers are those of ``model`` itself. Raises ModelError for a
    name or a shape that the model does not have.
    """
    tensors = [*model.parameters(), *model.buffers()]
    twin = copy.deepcopy(model, {id(t): t for t in tensors})
    for name, pair in pairs.items():
        module = _module(twin, name)
        _check(name, module, pair)
        parent, _, own = name.rpartition(".")
        setattr(twin.get_submodule(parent), own, LowRankLinear(module, pair))
    return twin


def with_adapter(model: nn.Module, folder: str | Path) -> nn.Module:
    """Return a twin of ``model`` with the LoRA adapter that ``folder`` holds.

    The folder is one that peft writes: adapter_config.json and
    adapter_model.safetensors. Raises ModelError for files that are missing, and for
    adapters that are more than low-rank pairs (DoRA, retrained biases or modules).
    """
    path = Path(folder)
    config = _config(path)
    return with_low_rank(model, _pairs(path, config))


def _config(path: Path) -> dict[str, Any]:
    try:
        found = json.loads((path / "adapter_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path}: no adapter_config.json to read: {error}") from None
    for key, plain in _UNKNOWN.items():
        if found.get(key, plain) not in (plain, [], None):
            raise ModelError(
                f"{path}: {key} = {found[key]!r}: the adapter is more than low-rank "
                "pairs; merge it into a copy of the model and give that"
            )
    return found


def _pairs(path: Path, config: Mapping[str, Any]) -> dict[str, LowRank]:
    from safetensors.torch import load_file

    file = path / "adapter_model.safetensors"
    if not file.exists():
        raise ModelError(f"{path}: no adapter_model.safetensors beside its config")
    sides: dict[str, dict[str, Tensor]] = {}
    for key, value in load_file(file).items():
        found = _KEY.match(key)
        if found is None:
            raise ModelError(f"{file}: '{key}' is no lora_A or lora_B of a linear")
        sides.setdefault(found["module"], {})[found["side"]] = value
    pairs = {}
    for name, side in sides.items():
        if len(side) < 2:
            raise ModelError(f"{file}: '{name}' has only lora_{next(iter(side))}")
        rank = side["A"].shape[0]
        pairs[name] = (side["A"], side["B"], _scale(name, rank, config))
    return pairs


def _scale(name: str, rank: int, config: Mapping[str, Any]) -> float:
    alpha = config.get("lora_alpha", rank)
    for pattern, value in (config.get("alpha_pattern") or {}).items():
        if re.search(rf"(^|\.){pattern}$", name):
            alpha = value
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def _module(model: nn.Module, name: str) -> nn.Module:
    try:
        return model.get_submodule(name)
    except AttributeError:
        raise ModelError(
            f"the adapter is for a module '{name}', which {type(model).__name__} "
            "does not have; is it the adapter of another model?"
        ) from None


def _check(name: str, module: nn.Module, pair: LowRank) -> None:
    down, up, _ = pair
    weight = getattr(module, "weight", None)
    sizes = {down.shape[1], up.shape[0]}
    if not isinstance(weight, torch.Tensor) or sizes != set(weight.shape):
        shape = None if weight is None else tuple(weight.shape)
        raise ModelError(
            f"the adapter's '{name}' goes from {down.shape[1]} to {up.shape[0]} "
            f"channels, the model's weight is {shape}; is it another model's?"
        )
