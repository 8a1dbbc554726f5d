"""Operators on the neurons of feed-forward networks: count, choose, gather, use.

Shapes, wherever they are named: ``counts`` int32 [R, F], for each of F neurons the
tokens that have it among their own; ``indices`` int64 [R, C], the C core neurons,
ascending, or -1 where none were chosen yet. R is 1, for all rows of a batch together,
or the number of rows.
"""

from graphopt.codegen.neurons import PARTS
from graphopt.ops.neurons.choose import choose_neurons, kept_neurons, nearest_neurons
from graphopt.ops.neurons.count import count_neurons, count_reference
from graphopt.ops.neurons.gather import gather_neurons, gather_reference
from graphopt.ops.neurons.gather_codes import gather_codes
from graphopt.ops.neurons.hold import check_neurons, hold_neurons
from graphopt.ops.neurons.own import (
    clear_behind,
    count_own,
    most_chosen,
    own_neurons,
    valid_linear,
)
from graphopt.ops.neurons.row_linear import row_linear

__all__ = [
    "PARTS",
    "check_neurons",
    "choose_neurons",
    "clear_behind",
    "count_neurons",
    "count_own",
    "count_reference",
    "gather_codes",
    "gather_neurons",
    "gather_reference",
    "hold_neurons",
    "kept_neurons",
    "most_chosen",
    "nearest_neurons",
    "own_neurons",
    "row_linear",
    "valid_linear",
]
