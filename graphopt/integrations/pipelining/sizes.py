"""The sizes that values of a symbolic graph have in a call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import Tensor, fx

from graphopt.errors import ModelError
from graphopt.ir.match import size_expr, value_of


@dataclass(frozen=True)
class TensorLike:
    """Sizes, dtype and device of a tensor."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    def empty(self) -> Tensor:
        """Return such a tensor; its content is not set."""
        return torch.empty(self.shape, dtype=self.dtype, device=self.device)


class Sizes:
    """Where each size symbol of ``gm`` is found among the arguments of a call."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self._places: dict[sympy.Symbol, tuple[int, int | None]] = {}
        for place, node in enumerate(gm.graph.find_nodes(op="placeholder")):
            value = value_of(node)
            if isinstance(value, torch.SymInt):
                self._note(value, place, None)
            elif isinstance(value, Tensor):
                for axis, size in enumerate(value.shape):
                    self._note(size, place, axis)

    def _note(self, size: Any, place: int, axis: int | None) -> None:
        expression = size_expr(size)
        if isinstance(expression, sympy.Symbol):
            self._places.setdefault(expression, (place, axis))

    def of(self, arguments: Sequence[Any]) -> Callable[[fx.Node], TensorLike]:
        """Return what tells a node's sizes in a call with ``arguments``."""
        known = {
            symbol: arguments[place] if axis is None else arguments[place].shape[axis]
            for symbol, (place, axis) in self._places.items()
        }

        def like(node: fx.Node) -> TensorLike:
            value = value_of(node)
            shape = [size_expr(size).subs(known) for size in value.shape]
            if unknown := [size for size in shape if not size.is_number]:
                raise ModelError(
                    f"pipelining: the size {unknown[0]} of {node.name} is known only "
                    "when it is computed, and stages send tensors of fixed sizes; "
                    "leave out passes that keep as many tokens as the text asks for"
                )
            return TensorLike(tuple(map(int, shape)), value.dtype, value.device)

        return like
