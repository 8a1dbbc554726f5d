"""What int8 operators have made of the weights of models, and where the floats went.

Kept as long as the parameter lives and is not written to (`graphopt.ops.prepared`). A
weight may be asked for in both forms: packed for oneDNN's product over many rows, and
as it is for dot products over few.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from graphopt.memory import page_out
from graphopt.ops.int8.weights import Int8Weight, on_file
from graphopt.ops.prepared import Prepared

prepared = Prepared(Int8Weight)
prepared_transposed = Prepared(lambda weight: Int8Weight(weight.t()))


def statistics_of(parameter: Tensor) -> dict[str, Any] | None:
    """Return a weight's counts of shadow columns; None for one that has no codes."""
    found = prepared.known(parameter) or prepared_transposed.known(parameter)
    return None if found is None else found.statistics()


def packed_weight(
    weight: Tensor, transposed: bool, to_file: bool
) -> tuple[Int8Weight, Tensor]:
    """Return what is made of ``weight`` and its codes in oneDNN's layout."""
    return _made(weight, transposed, to_file, Int8Weight.packed)


def coded_weight(
    weight: Tensor, transposed: bool, to_file: bool
) -> tuple[Tensor, Tensor]:
    """Return the codes int8 [N, K] of ``weight`` and the scales float32 [N]."""
    held, codes = _made(weight, transposed, to_file, Int8Weight.codes)
    return codes, held.scales


def _made(
    weight: Tensor,
    transposed: bool,
    to_file: bool,
    make: Callable[[Int8Weight, Tensor], tuple[Tensor, bool]],
) -> tuple[Int8Weight, Tensor]:
    store = prepared_transposed if transposed else prepared
    held = store(weight)
    found, is_new = make(held, weight.t() if transposed else weight)
    if is_new and to_file:
        _let_go(weight, held)
        store.keep(weight, held)
    return held, found


def _let_go(weight: Tensor, held: Int8Weight) -> None:
    """Leave the float weight on a file: a new one, unless it lies there already."""
    loaded = weight.detach()
    if not held.is_on_file:
        weight.data, _ = on_file(weight)
        held.is_on_file = True
    page_out(loaded)
