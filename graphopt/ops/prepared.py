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
        found = self.known(parameter)
        if found is None:
            found = self._make(parameter.detach())
            self.made += 1
            self.keep(parameter, found)
        return found

    def known(self, parameter: Tensor) -> T | None:
        """Return what was made of ``parameter`` as it is now; None if nothing was."""
        held = self._store.get(parameter)
        if held is None or held[0] != state_of(parameter):
            return None
        found: T = held[1]
        return found

    def keep(self, parameter: Tensor, made: T) -> None:
        """Take ``made`` as what belongs to ``parameter`` as it is now."""
        self._store[parameter] = (state_of(parameter), made)


def state_of(parameter: Tensor) -> tuple[int, ...]:
    """Return what changes when ``parameter`` is written to or gets other storage."""
    version = 0 if parameter.is_inference() else parameter._version
    return (parameter.data_ptr(), version)
