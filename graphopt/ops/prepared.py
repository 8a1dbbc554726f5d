"""What an operator makes of a parameter once, and again when the parameter changes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, TypeVar

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

T = TypeVar("T")


class Prepared(Generic[T]):
    """A store of ``make(parameter)``, kept as long as the parameter lives.

    A parameter that was written to (an optimiser's step, ``load_state_dict``) or given
    other storage is prepared anew at the next call. ``made`` counts the preparations.
    """

    def __init__(self, make: Callable[[Tensor], T]) -> None:
        self._make = make
        self._store: Any = WeakTensorKeyDictionary()
        self.made = 0

    def __call__(self, parameter: Tensor) -> T:
        """Return what was made of ``parameter`` as it is now."""
        state = _state(parameter)
        known = self._store.get(parameter)
        if known is not None and known[0] == state:
            found: T = known[1]
            return found
        result = self._make(parameter.detach())
        self.made += 1
        self._store[parameter] = (state, result)
        return result


def _state(parameter: Tensor) -> tuple[int, ...]:
    version = 0 if parameter.is_inference() else parameter._version
    return (parameter.data_ptr(), version)
