"""Sizes that the inputs of a graph have in common, though tracing did not say so."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import SymInt, fx

from graphopt import _compat
from graphopt.ir.match import value_of


def tie_sizes(gm: fx.GraphModule) -> None:
    """Let the inputs that come by token have one size for the rows, one for the tokens.

    Once Dynamo has seen a mask of another length than the ids, as in decoding, it gives
    later masks a size of their own, and nothing would tell that it is that of the ids.
    Sizes that were equal when traced become equal by a guard: a call for which they are
    not compiles again. Inputs of the call itself only; a cache is as long as it is.
    """
    inputs = [n for n in gm.graph.find_nodes(op="placeholder") if _is_by_token(n)]
    for axis in (0, 1):
        found: dict[int, list[SymInt]] = {}
        for node in inputs:
            size = value_of(node).shape[axis]
            hint = _compat.size_hint(size)
            if isinstance(size, SymInt) and hint is not None:
                found.setdefault(hint, []).append(size)
        for sizes in found.values():
            for one, other in pairwise(sizes):
                bool(one == other)  # adds the guard


def _is_by_token(node: fx.Node) -> bool:
    """Tell whether ``node`` is [B, S] of integers or [B, S, H], an argument itself."""
    value, source = value_of(node), _compat.placeholder_source(node)
    if not isinstance(value, torch.Tensor) or "." in source or not source:
        return False
    wide = 3 if value.is_floating_point() else 2
    return value.dim() == wide
