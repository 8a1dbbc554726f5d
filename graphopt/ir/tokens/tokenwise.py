"""Tell whether operators work token by token, from what they do to an axis of tokens.

A pass that lays tokens out anew may do so only where nothing but attention looks from
one token at another. Each operator is run on fake tensors, broken up into those of
ATen, whose number is small; a count of tokens that divides no other size shows which
axis they are on.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from graphopt.ir.sizes.rules import aligned

_RESHAPES = {"view", "_unsafe_view", "reshape", "_reshape_alias"}
_RESHAPES |= {"squeeze", "unsqueeze"}
# The same elements in another order of axes, or more often, or of another kind.
_COPIES = {"permute", "transpose", "t", "expand", "clone", "alias", "detach", "copy_"}
_COPIES |= {"_to_copy", "contiguous", "lift_fresh", "zeros_like", "ones_like"}
_COPIES |= {"empty_like", "full_like", "new_zeros", "new_ones", "new_full", "new_empty"}
# They look along the axes ``dim`` and no others.
_ALONG = {"sum", "mean", "amax", "amin", "var", "var_mean", "argmax", "argmin", "any"}
_ALONG |= {"all", "prod", "logsumexp", "_softmax", "_log_softmax", "cumsum", "sort"}
_ALONG |= {"topk", "gather", "scatter", "select", "slice", "split", "unbind", "cat"}
_ALONG |= {"split_with_sizes", "chunk", "stack", "linalg_vector_norm", "max", "min"}
_ALONG |= {"scatter_add", "glu", "cumprod", "flip", "roll", "index_select"}
_PRODUCTS = {"mm": 0, "bmm": 0, "addmm": 1, "baddbmm": 1}  # place of the left factor
_NORMS = {"native_layer_norm", "_fused_rms_norm", "rms_norm"}


class MixesTokensError(Exception):
    """An operator whose result for one token depends on others."""


class TokenwiseMode(TorchDispatchMode):
    """Raise MixesTokensError for what is not done token by token.

    ``counts``: numbers of tokens, primes that divide no other size.
    """

    def __init__(self, counts: Sequence[int]) -> None:
        super().__init__()
        self.counts = tuple(counts)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        self._check(func, args, kwargs, result)
        return result

    def _check(self, func: Any, args: Any, kwargs: Any, result: Any) -> None:
        name = func._schema.name.removeprefix("aten::")
        inputs = [x for x in _tensors((args, kwargs)) if self.axes(x)]
        outputs = _tensors(result)
        if not inputs or not outputs:
            return
        if any(len(self.axes(x)) != 1 for x in (*inputs, *outputs)):
            raise MixesTokensError(f"{name} joins tokens or adds them up")
        if not self._is_tokenwise(name, func, args, kwargs, inputs, outputs):
            raise MixesTokensError(f"{name} may look from one token at others")

    def _is_tokenwise(
        self, name: str, func: Any, args: Any, kwargs: Any, inputs: Any, outputs: Any
    ) -> bool:
        if torch.Tag.pointwise in func.tags:
            places = {self.axis(x) - x.ndim for x in (*inputs, *outputs)}
            return len(places) == 1
        if name in _RESHAPES:
            return aligned(tuple(inputs[0].shape), tuple(outputs[0].shape))
        if name in _COPIES:
            return True
        if name in _ALONG:
            return self._looks_elsewhere(func, args, kwargs)
        if name in _PRODUCTS:
            left, right = args[_PRODUCTS[name] :][:2]
            row = not self.axes(right) and self.axes(left) != [left.ndim - 1]
            batch = self.axes(left) == self.axes(right) == [0] and left.ndim > 2
            return row or batch
        if name in _NORMS:
            return bool(self.axis(args[0]) < args[0].ndim - len(args[1]))
        if name == "embedding":
            return not self.axes(args[0])
        if name == "index":
            return not self.axes(args[0]) and len(_tensors(args[1])) == 1
        return False

    def _looks_elsewhere(self, func: Any, args: Any, kwargs: Any) -> bool:
        dims = _dims(func, args, kwargs)
        if func._schema.name == "aten::cat":  # an empty cache may stand in front
            full = [x for x in args[0] if x.numel()]
            if len(full) == 1:
                return True
        tokens = [x for x in _tensors(args) if self.axes(x)]
        return dims is not None and not any(
            self.axis(x) in {d % x.ndim for d in dims} for x in tokens
        )

    def axes(self, x: Tensor) -> list[int]:
        """Return the axes of ``x`` that count tokens."""
        return [
            axis
            for axis, size in enumerate(x.shape)
            if size and any(size % count == 0 for count in self.counts)
        ]

    def axis(self, x: Tensor) -> int:
        """Return the one axis of tokens of ``x``."""
        return self.axes(x)[0]


def _dims(func: Any, args: Any, kwargs: Any) -> list[int] | None:
    """Return the axes that an operator's ``dim`` names; None where it names all."""
    for place, parameter in enumerate(func._schema.arguments):
        if parameter.name in ("dim", "dims"):
            given = kwargs.get(parameter.name, parameter.default_value)
            given = args[place] if place < len(args) else given
            if given is None or given == []:
                return None
            return list(given) if isinstance(given, (list, tuple)) else [given]
    return None


def _tensors(values: Any) -> list[Tensor]:
    found: list[Tensor] = []
    torch.utils._pytree.tree_map_only(Tensor, found.append, values)
    return found
