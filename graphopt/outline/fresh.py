"""Sizes that depend on data, as the plain symbols of a piece that is given them.

Inside a graph such a size has no value to compare with, and Inductor may lay tensors
out as it likes. A piece that gets tensors of these sizes knows them as well as those of
any other input, so it is compiled with symbols of its own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import sympy
import torch

from graphopt import _compat
from graphopt.outline.sizes import symbols_of

_LEAST_HINT = 509  # a prime, so that no size is taken for a multiple of another


class FreshSizes:
    """The example inputs of a piece in a fake mode of their own.

    ``inputs`` stand for ``examples`` with a new symbol for each of theirs.
    """

    def __init__(self, examples: Sequence[Any]) -> None:
        self.mode = _compat.new_fake_mode(symbolic=True)
        self._new: dict[sympy.Symbol, Any] = {}
        hints = [_compat.size_hint(s) for s in _backed(examples)]
        self._hint = max([_LEAST_HINT, *hints]) + 2
        self.inputs = [self._fresh(example) for example in examples]

    def _fresh(self, example: Any) -> Any:
        if isinstance(example, torch.SymInt):
            return self._size(example)
        if not isinstance(example, torch.Tensor):
            return example
        sizes = [self._size(s) for s in example.shape]
        strides = [self._size(s) for s in example.stride()]
        return _compat.fake_like(self.mode, example, sizes, strides)

    def _size(self, size: Any) -> Any:
        if not isinstance(size, torch.SymInt):
            return size
        expr = size.node.expr
        for symbol in sorted(expr.free_symbols, key=str):
            if symbol not in self._new:
                self._new[symbol] = self._symbol(size, symbol)
        environment = self.mode.shape_env
        swapped = expr.xreplace({s: n.node.expr for s, n in self._new.items()})
        hint = swapped.xreplace({n.node.expr: n.node.hint for n in self._new.values()})
        return environment.create_symintnode(swapped, hint=int(hint))

    def _symbol(self, size: torch.SymInt, symbol: sympy.Symbol) -> Any:
        old = size.node.shape_env
        hint = _compat.symbol_hint(old, symbol)
        if hint is None:
            hint, self._hint = self._hint, self._hint + 2
        return _compat.new_symbol(self.mode, hint, old.var_to_range[symbol])

    def guards(self) -> list[Any]:
        """Return what compiling assumed, as expressions in the symbols of before."""
        back = {n.node.expr: s for s, n in self._new.items()}
        found = (g.expr.xreplace(back) for g in self.mode.shape_env.guards)
        return list(dict.fromkeys(found))


class SizeCheck:
    """Tell, of a piece's arguments, whether a guard on their sizes holds.

    Raises ValueError for a guard that these ``examples`` do not show the sizes of.
    """

    def __init__(self, guard: Any, examples: Sequence[Any]) -> None:
        symbols = sorted(guard.free_symbols, key=str)
        self.guard = guard
        self._places = [_shown(symbol, examples) for symbol in symbols]
        self._holds = sympy.lambdify(symbols, guard, modules="math")

    def __call__(self, arguments: Sequence[Any]) -> None:
        """Raise RuntimeError unless the guard holds."""
        sizes = [
            arguments[i] if axis is None else arguments[i].shape[axis]
            for i, axis in self._places
        ]
        if not self._holds(*sizes):
            raise RuntimeError(
                f"graphopt: the code of a layer holds where {self.guard}, and these "
                f"sizes are {sizes}; compile with options={{'outline': False}}"
            )


def _shown(symbol: Any, examples: Sequence[Any]) -> tuple[int, int | None]:
    """Return which argument shows ``symbol``, and its axis; None: it is the size."""
    for place, example in enumerate(examples):
        if isinstance(example, torch.SymInt) and example.node.expr == symbol:
            return place, None
        for axis, size in enumerate(getattr(example, "shape", ())):
            if isinstance(size, torch.SymInt) and size.node.expr == symbol:
                return place, axis
    raise ValueError(f"no argument shows {symbol}")


def _backed(examples: Sequence[Any]) -> list[torch.SymInt]:
    tensors = [e for e in examples if isinstance(e, torch.Tensor)]
    sizes: list[Any] = [s for e in tensors for s in e.shape]
    sizes += [e for e in examples if isinstance(e, torch.SymInt)]
    return [s for s in sizes if isinstance(s, torch.SymInt) and s.node.has_hint()]


def depends_on_data(examples: Sequence[Any]) -> bool:
    """Tell whether some size of ``examples`` is known only when operators have run."""
    symbols = (s for example in examples for s in symbols_of(example))
    return any(map(_compat.is_data_symbol, symbols))
